"""``python -m robust_spectral.evaluations`` is the command ``robust-spectral``."""


def main() -> None:
    """Run the command line, or say what to install where the core is installed alone."""
    try:
        from .commands import main as run
    except ModuleNotFoundError as error:
        raise SystemExit(f"robust-spectral: {error.name} is missing; pip install 'robust-spectral[evaluations]'") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
