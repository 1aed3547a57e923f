"""``python -m ud2m COMMAND [KEY=VALUE ...]``: the console script ``ud2m`` under another name."""

from ud2m.cli.commands import start

if __name__ == "__main__":
    start()
