"""``python -m falloff`` is ``falloff``."""

from falloff.cli import main

if __name__ == "__main__":
    main()
