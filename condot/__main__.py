"""`python -m condot COMMAND ...`, and what launchers are given: `accelerate launch -m condot train ...`."""

from condot.cli import main

if __name__ == "__main__":
    main()
