"""`python -m flap_export`."""

from flap_export.cli import main

if __name__ == "__main__":
    main()
