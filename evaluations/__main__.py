"""The command ``robust-spectral``, as ``python -m robust_spectral.evaluations``."""


def main() -> None:
    """Run the command line; where only the core package is installed, say which extra to install."""
    try:
        from .commands import main as run
    except ModuleNotFoundError as error:
        raise SystemExit(f"robust-spectral: {error.name} is missing; pip install 'robust-spectral[evaluations]'") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
