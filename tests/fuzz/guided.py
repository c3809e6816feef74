"""A coverage-guided fuzzer of the decoders: what reaches a new branch is kept, and changed further.

    python tests/fuzz/guided.py decisions --seconds 600
    python tests/fuzz/guided.py decisions weights --seconds 600      # one after the other, each for so long

It ends with an error, and leaves the message beside it, as soon as a decoder does anything but refuse a message in one
line or let one through that is exactly what it should be; when one takes ten seconds; or when memory passes 3 GB. The
fuzzer is atheris (libFuzzer).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import atheris

sys.path.insert(0, str(Path(__file__).parent))

# Our decoders and Python's JSON; the libraries around them come with them, and are not guided by.
DECODERS = [f"lerobot_policy_pi_rl.runtime.{name}" for name in ("packing", "wire", "handshake", "chunks")]

with atheris.instrument_imports(include=[*DECODERS, "json"]):
    import fuzz_messages


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzzes some kinds of messages; ends with the first that does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="+", choices=sorted(fuzz_messages.MESSAGES))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=Path("outputs/fuzz"), help="folder of what was found")
    options = parser.parse_args(arguments)
    for kind in options.kinds:
        # The fuzzer ends its process, and everything is imported here.
        if (child := os.fork()) == 0:
            fuzz(kind, options)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"error: {kind}: the decoder does not hold; see above, and {options.corpus}")


def fuzz(kind: str, options: argparse.Namespace) -> NoReturn:
    """Fuzzes one kind of message; does not return."""
    check, valid = fuzz_messages.MESSAGES[kind]
    corpus = options.corpus / kind
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "valid").write_bytes(valid)
    limits = ["-timeout=10", "-rss_limit_mb=3000", f"-max_len={4 * len(valid)}", "-print_final_stats=1"]
    found = f"-artifact_prefix={options.corpus}/{kind}-"
    chosen = [f"-max_total_time={options.seconds}", f"-seed={options.seed}", found, str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *chosen], lambda data: fuzz_messages.refused(check, data))
    atheris.Fuzz()
    raise AssertionError("the fuzzer ends its process")


if __name__ == "__main__":
    main()
