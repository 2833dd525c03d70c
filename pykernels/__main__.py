"""`python -m pykernels info|demo|train|bench|plan|quantize`: each command has --help and --json."""

import importlib
import sys

COMMANDS = {
    "info": ("pykernels._info", "what is installed, how it was built, and which backend serves each operation"),
    "demo": ("pykernels.demo", "quantise two real models; table of size, speed and quality"),
    "train": (
        "pykernels.train",
        "train a small language model with several recipes; losses, memory and speed compared",
    ),
    "bench": ("pykernels.bench", "measure operations against their peers on this machine"),
    "plan": ("pykernels._plan", "will a model fit, what to switch on first, and the code; or memory by ZeRO stage"),
    "quantize": ("pykernels.quantization.checkpoint", "quantise a safetensors file in bounded memory"),
}


def usage() -> str:
    """The list of commands."""
    rows = "\n".join(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items())
    return f"usage: python -m pykernels COMMAND [options]\n\ncommands:\n{rows}\n\n`COMMAND --help` lists its options."


def main(argv: list[str]) -> int:
    """Runs one command; 0 when it went well, 2 for a command that does not exist."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"pykernels: no command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
