"""Draw posterior samples: ``python sample.py model=<name or export folder> [input=...]``. See the README."""

from ud2m.cli.commands import run_command

if __name__ == "__main__":
    run_command("sample")
