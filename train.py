"""Train: ``python train.py experiment=<name> [overrides]``; ``-m`` sweeps. See conf/ and the README."""

from ud2m.cli.commands import run_command

if __name__ == "__main__":
    run_command("train")
