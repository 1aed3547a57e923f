"""Compare methods on the same operators, images and noise: ``python -m ud2m.evaluate [overrides]``.

See docs/evaluation.md and conf/evaluate.yaml.
"""

from ud2m.cli.evaluate import command

if __name__ == "__main__":
    command()
