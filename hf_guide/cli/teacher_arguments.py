"""What the commands that take a teacher have in common."""

import argparse
from typing import Any


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the teacher, and how it is found."""
    parser.add_argument("teacher", metavar="TEACHER", help="the big model: a Hub id or a folder")
    parser.add_argument("--gguf-file", metavar="FILE", help="read this GGUF file of the teacher")
    parser.add_argument("--revision", help="branch, tag or commit of the teacher on the Hub")
    parser.add_argument("--token", help="access token for the Hub; by default the one you are logged in with")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the teacher")


def hub_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return where a teacher is found, as keywords of `from_pretrained`."""
    return {"revision": args.revision, "token": args.token, "trust_remote_code": args.trust_remote_code}


def to_flag(name: str) -> str:
    """Return the flag of an option."""
    return "--" + name.replace("_", "-")
