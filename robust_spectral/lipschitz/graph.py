"""The graph of the ATen operations that a model runs on one batch, from `torch.export`.

Mutations are made functional, so that each node's value is final. Nothing is claimed for a model that `torch.export` refuses,
or whose forward pass changes its own state or its input. Weights are the model's own tensors, read when the graph is made.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import os
import random
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

from ..operators import evaluating
from .live_state import LiveState
from .table import TABLE, NoClaim, operation_of

aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent) + os.sep
_READABLE = 1000  # most elements of a constant whose values may decide what a forward pass does
_EXACT = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@dataclass(frozen=True)
class Graph:
    """The operations of a model's forward pass at one input shape.

    Attributes:
        model: Name of the model's class, for messages.
        nodes: The operations in order; placeholders are the input and the constants.
        constants: Values of parameters, buffers and other tensors, by node.
        input: The node of the input.
        outputs: Nodes of the output's tensors.
        moving: Nodes whose value depends on the input.
        layers: By the node of a linear operation that is all its module does, the name of the module.
        dtype: Type of the example.
    """

    model: str
    nodes: tuple[fx.Node, ...]
    constants: Mapping[fx.Node, Tensor]
    input: fx.Node
    outputs: tuple[fx.Node, ...]
    moving: frozenset[fx.Node]
    layers: Mapping[fx.Node, str]
    dtype: torch.dtype

    def values(self, x: Tensor) -> dict[fx.Node, Any]:
        """The value of each node for an input, in float64, casts included.

        Raises:
            NoClaim: an operation does not run in float64.
        """
        given = {**self.constants, self.input: x}
        found: dict[fx.Node, Any] = {node: value.to(_raised(value.dtype)) for node, value in given.items()}
        for node in self.nodes:
            if node.op == "call_function":
                try:
                    found[node] = self.rerun(node, found.__getitem__)
                except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
                    raise NoClaim(f"{node.name} (at {where(node)}) does not run in float64: {error}") from error
        return found

    def rerun(self, node: fx.Node, value_of: Any, arguments: tuple[Any, Any] | None = None) -> Any:
        """Compute a node's value for other values of its arguments, or for other arguments, in float64."""
        if operation_of(node.target) is aten._assert_tensor_metadata:
            return None
        args, kwargs = pytree.tree_map(_raised, fx.node.map_arg(arguments or (node.args, node.kwargs), value_of))
        if operation_of(node.target) is aten.rms_norm and (len(args) < 4 or args[3] is None):
            args = (*args[:2], args[2] if len(args) > 2 else None, torch.finfo(self.dtype).eps)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def run(self, x: Tensor) -> list[Tensor]:
        """The output's tensors for an input of the example's shape, in float64."""
        values = self.values(x)
        return [values[node] for node in self.outputs]


def _raised(item: Any) -> Any:
    return _EXACT.get(item, item) if isinstance(item, torch.dtype) else item


def pair_of(example_input: Tensor) -> Tensor:
    """The first input of a batch twice, so that no operation drops the batch axis."""
    return example_input[:1].repeat(2, *[1] * (example_input.ndim - 1))


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and restore its mode, its tensors, its Python state and the random states afterwards."""
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.is_cuda})
    state, drawn, drawn_by_numpy = LiveState(model), random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices), evaluating(model):
            yield
    finally:
        state.restore()
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)


def graph_of(model: nn.Module, example: Tensor, rewrite: Callable[[Any], Any] | None = None) -> Graph:
    """The graph of a model in eval mode, on a batch of two.

    Args:
        model: A model that runs on the example; within `preserved`.
        example: (2, ...), as `pair_of` makes it.
        rewrite: Makes an exported program functional, with the same values; default by torch's own decompositions, if needed.

    Raises:
        NoClaim: `torch.export` cannot follow the model, or its forward pass changes the model's state or its input.
        InputError: the model does not run on the example.
    """
    with torch.no_grad():
        state = _steady(model, example)
        program = _exported(model, example, rewrite)
        state.restore()
    if example.dtype in (torch.float16, torch.bfloat16):
        raise NoClaim(f"{type(model).__name__} computes in {example.dtype}, for which nothing is proved; use model.float()")
    return _graph(program, model, example)


class InputError(ValueError):
    """A model does not run on an example; the message is that of the model's own error."""


def _steady(model: nn.Module, example: Tensor) -> LiveState:
    """The state of a model after its first call, if that is the same for two inputs, and further calls leave it unchanged."""
    other = torch.rand_like(example) if example.is_floating_point() else example
    before = LiveState(model)
    try:
        model(example.clone())
    except Exception as error:  # whatever the model's own code raises
        raise InputError(str(error)) from error
    one = LiveState(model, copies=False)
    before.restore()
    model(other.clone())
    steady = LiveState(model, copies=False)
    what = one.differs(steady)
    if what is None:
        model(example.clone())
        what = steady.changed()
    if what is not None:
        raise NoClaim(
            f"the forward pass of {type(model).__name__} changes its own state ({what}), so that its output may depend on "
            "earlier calls; keep no state in forward"
        )
    return steady


def _exported(model: nn.Module, example: Tensor, rewrite: Callable[[Any], Any] | None) -> Any:
    try:
        with _quiet():
            program = torch.export.export(_Outputs(model), (example.clone(),), strict=False)
            if rewrite is not None:
                return rewrite(program)
            return program if _is_functional(program) else program.run_decompositions({})
    except NoClaim:
        raise
    except Exception as error:  # export runs the model's own code on values without numbers, which may raise any error
        raise NoClaim(f"torch.export cannot follow {type(model).__name__}{_place(error)}: {_cause(model, error)}") from error


def _is_functional(program: Any) -> bool:
    """Whether no operation writes into a tensor, and all that depend on the input have a row in the table.

    Otherwise the graph is made functional, and operations are replaced by the simpler ones that they are defined by.
    """
    moving = _depending(program, program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op not in ("call_function", "placeholder", "output"):
            return False
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return False
        if node in moving and operation_of(node.target) not in (*TABLE, aten._assert_tensor_metadata):
            return False
    return True


class _Outputs(nn.Module):
    """A model whose output is the tensors of another model's output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the output."""
        return tuple(tensors_of(self.model(x)))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a model's output: a tensor, or a list, dictionary or dataclass with tensors.

    Raises:
        NoClaim: the output is of another type.
    """
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = [getattr(output, part.name) for part in fields(output)]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in tensors_of(part)]
    if output is None or isinstance(output, int | float | str):
        return []
    raise NoClaim(f"the model's output is of type {type(output).__name__}; let it return tensors")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's messages about a failed export from the terminal, and let a model read numbers off short constants."""
    before, limit = logging.root.manager.disable, fake_tensor.CONSTANT_NUMEL_LIMIT
    logging.disable(logging.CRITICAL)
    fake_tensor.CONSTANT_NUMEL_LIMIT = _READABLE
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        fake_tensor.CONSTANT_NUMEL_LIMIT = limit


def _place(error: BaseException) -> str:
    """The last line outside torch that an error passed through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_TORCH, "<", __file__))]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: `{frames[-1].line}`)" if frames else ""


def _cause(model: nn.Module, error: BaseException) -> str:
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        return "a part of it is scripted (torch.jit.script); use the module that the part was made from"
    kind, text = type(error).__name__, str(error).strip().partition("\n")[0]
    if "DataDependent" in kind or "data-dependent" in text or "Tensor.item" in text:
        return (
            "it reads numbers off its input or weights, as a branch on values does; write it as torch operations, such as "
            "torch.where"
        )
    if "numpy" in text.lower() or "to_numpy" in text or ".numpy()" in text:
        return "values leave torch for numpy; write the step as torch operations"
    if "fake tensor" in text:
        return "a step takes values of the input where export does not see them, as .data and torch.tensor do; use .detach()"
    return f"{kind}: {text[:200]}" if text else kind


def _graph(program: Any, model: nn.Module, example: Tensor) -> Graph:
    name, signature, (*nodes, output) = type(model).__name__, program.graph_signature, program.graph.nodes
    moving = _depending(program, signature.user_inputs)
    (source,) = (node for node in moving if node.op == "placeholder")
    results = list(zip(output.args[0], signature.output_specs, strict=True))
    outputs = tuple(node for node, spec in results if spec.kind.name == "USER_OUTPUT" and isinstance(node, fx.Node))
    for spec in signature.output_specs:
        if spec.kind.name == "USER_INPUT_MUTATION":
            raise NoClaim(f"{name} writes into its input; let forward work on a copy, as x = x.clone() makes it")
        written = [given.arg.name for given in signature.input_specs if given.target == spec.target]
        if spec.kind.name.endswith("MUTATION") and not _depending(program, written).isdisjoint(outputs):
            buffer = spec.target.removeprefix("model.")
            raise NoClaim(f"{name} writes into its buffer '{buffer}' and reads it; keep no state in forward")
    targets, held = {spec.arg.name: spec.target for spec in signature.input_specs}, {**program.constants, **program.state_dict}
    constants: dict[fx.Node, Tensor] = {}
    for node in nodes:
        if node.op == "placeholder" and node is not source:
            value = held.get(targets[node.name])
            if not isinstance(value, Tensor):
                raise NoClaim(f"{name} uses {targets[node.name]}, which is no tensor")
            constants[node] = value.detach()
    if not outputs:
        raise NoClaim(f"the output of {name} has no tensor")
    if any(node.op == "get_attr" for node in nodes):
        raise NoClaim(f"{name} runs a part under torch.cond, autocast or a checkpoint, which is not covered")
    return Graph(name, tuple(nodes), constants, source, outputs, moving, _layers(nodes, moving), example.dtype)


def _depending(program: Any, roots: Collection[str]) -> frozenset[fx.Node]:
    """The placeholders of some names, and the nodes whose value depends on one of them."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in roots or (node.op == "call_function" and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return frozenset(found)


_LINEAR = (aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d,
           aten.conv_transpose3d)  # fmt: skip


def _layers(nodes: list[fx.Node], moving: frozenset[fx.Node]) -> dict[fx.Node, str]:
    """The module of each dense or convolutional operation that is, with padding before it, all that the module's call does."""
    calls: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node in moving and node.op == "call_function" and (stack := node.meta.get("nn_module_stack")):
            calls.setdefault(next(reversed(stack)), []).append(node)
    return {
        steps[-1]: module_of(steps[-1])[0]
        for steps in calls.values()
        if operation_of(steps[-1].target) in _LINEAR and all(operation_of(step.target) is aten.pad for step in steps[:-1])
    }


def module_of(node: fx.Node) -> tuple[str, str]:
    """Name and class name of the innermost module that runs a node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1][:2]
    return path.removeprefix("model").removeprefix("."), str(kind).rpartition(".")[2]


def where(node: fx.Node) -> str:
    """A node's module, and the line of code that runs it where it is not torch's own."""
    path, kind = module_of(node)
    lines = [*(line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()), ""]
    files = [i for i, line in enumerate(lines) if line.startswith("File ") and not line.startswith('File "<')]
    if not files or _TORCH in lines[files[-1]]:
        return f"'{path}', {kind}"
    code = f"`{lines[files[-1] + 1]}`"
    return f"'{path}', {code}" if path else code
