"""`mtroll convert`: hf2mcore, mcore2hf, gguf2hf."""

import argparse
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_troll.system import FAILED, REFUSED
from megatron_troll.terminal import shown

if TYPE_CHECKING:
    from megatron_troll.convert.plan import Conversion, Options
    from megatron_troll.parallel.groups import Group

DTYPES = {"keep": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_to(commands: "argparse._SubParsersAction") -> None:
    """Add `convert` and its sub-commands."""
    about = "convert checkpoints from Hugging Face to Megatron-Core and back, and GGUF files to Hugging Face"
    convert = commands.add_parser("convert", help=about, description=about)
    kinds = convert.add_subparsers(required=True, metavar="hf2mcore|mcore2hf|gguf2hf")
    into = kinds.add_parser("hf2mcore", help="a Hugging Face folder to a checkpoint that any layout loads")
    into.add_argument("source", metavar="SRC", help="folder with config.json and safetensors")
    into.set_defaults(run=hf2mcore)
    back = kinds.add_parser("mcore2hf", help="a checkpoint of any layout to a Hugging Face folder")
    back.add_argument("source", metavar="SRC", help="folder from hf2mcore, or runs/NAME/checkpoints/step_N")
    back.add_argument(
        "--like",
        metavar="HF",
        help="folder with config.json and tokenizer; default: SRC, or the folder that the run began with",
    )
    back.add_argument(
        "--leave-out",
        metavar="KEY",
        nargs="+",
        default=[],
        help="skip tensors whose keys end in KEY, because Hugging Face's format has no place for them",
    )
    back.set_defaults(run=mcore2hf)
    for kind in (into, back):
        kind.add_argument("target", metavar="DST", help="folder that is missing or empty")
        kind.add_argument("--dtype", choices=DTYPES, default="keep", help="dtype of weights (default: keep)")
        kind.add_argument(
            "--shard-gib",
            type=_gib,
            default=4.0,
            help="size of a file; an interrupted conversion resumes file by file (default: 4)",
        )
        kind.add_argument(
            "--verify", action="store_true", help="then compare the logits of both; loads each whole"
        )
    unpacked = kinds.add_parser("gguf2hf", help="a GGUF file of llama.cpp to a Hugging Face folder")
    unpacked.add_argument("source", metavar="FILE", help="file.gguf")
    unpacked.add_argument("target", metavar="DST", help="folder that is missing or empty")
    unpacked.add_argument(
        "--dtype",
        choices=[name for name in DTYPES if name != "keep"],
        default="fp32",
        help="dtype of weights",
    )
    unpacked.add_argument("--sha256", metavar="HEX", help="the sum that FILE has to have")
    unpacked.set_defaults(run=gguf2hf)


def _gib(text: str) -> float:
    size = float(text)
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError("a size above 0 is needed")
    return size


def hf2mcore(arguments: Namespace) -> int:
    def prepare(options: "Options") -> "Conversion":
        from megatron_troll.config import ConfigError
        from megatron_troll.convert.to_megatron import ToMegatron
        from megatron_troll.weights.quantised import quantisation_of

        source = Path(arguments.source)
        if arguments.verify and quantisation_of(source):
            raise ConfigError(
                "--verify: Hugging Face's code computes with quantised weights, as another model"
            )
        return ToMegatron(source, options)

    return _convert(arguments, prepare)


def mcore2hf(arguments: Namespace) -> int:
    def prepare(options: "Options") -> "Conversion":
        from megatron_troll.convert.to_hugging_face import ToHuggingFace, companions_of

        source = Path(arguments.source)
        like = Path(arguments.like) if arguments.like else companions_of(source)
        return ToHuggingFace(source, like, options, tuple(arguments.leave_out))

    return _convert(arguments, prepare)


def gguf2hf(arguments: Namespace) -> int:
    import torch

    from megatron_troll.config import ConfigError

    try:
        from megatron_troll.convert.gguf.folder import write_folder
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        return _tell(
            ConfigError("GGUF files are read by the package gguf: pip install 'gguf>=0.19'"), REFUSED
        )
    dtype = getattr(torch, DTYPES[arguments.dtype] or "")
    try:
        write_folder(Path(arguments.source), Path(arguments.target), dtype, arguments.sha256)
    except (ConfigError, OSError) as error:
        return _tell(error, REFUSED)
    _say(f"wrote {arguments.target}")
    return 0


def _convert(arguments: Namespace, prepare: "Callable[[Options], Conversion]") -> int:
    from megatron_troll.config import ConfigError
    from megatron_troll.convert.draft import ConversionError, TargetError
    from megatron_troll.convert.run import TIMEOUT
    from megatron_troll.mcore.checkpoint_folder import CheckpointError
    from megatron_troll.parallel.groups import joined
    from megatron_troll.weights.tensor_file import TensorFileError
    from megatron_troll.weights.torch_dist import TensorsError

    refusals = (CheckpointError, ConfigError, TargetError, TensorFileError, TensorsError, OSError)

    with joined(TIMEOUT) as world:
        try:
            conversion = prepare(_options(arguments, world))
            _run(conversion, Path(arguments.target), world)
            return _verify(conversion, arguments) if arguments.verify else 0
        except ConversionError as error:
            return _tell(error, FAILED)
        except refusals as error:
            return _tell(error, REFUSED)


def _options(arguments: Namespace, world: "Group") -> "Options":
    import torch

    from megatron_troll.config import ConfigError
    from megatron_troll.convert.plan import Options

    if arguments.verify and world.size > 1:
        raise ConfigError(
            "--verify loads each model whole, in one process: leave it out here, and afterwards run the same "
            "command with --verify and without torchrun; it does not convert again"
        )
    name = DTYPES[arguments.dtype]
    return Options(None if name is None else getattr(torch, name), int(arguments.shard_gib * 2**30))


def _run(conversion: "Conversion", target: Path, world: "Group") -> None:
    from rich.console import Console

    from megatron_troll.convert.progress import open_progress
    from megatron_troll.convert.run import convert

    written = convert(conversion, target, world, open_progress(Console(), world.rank))
    if world.rank == 0:
        _say(f"wrote {target}" if written else f"{target} exists already, written by the same conversion")
        for remark in conversion.remarks:
            _say(remark)


def _verify(conversion: "Conversion", arguments: Namespace) -> int:
    from megatron_troll.convert.verify import compare

    found = compare(conversion.sides(Path(arguments.target)), conversion.options.dtype)
    _say(str(found))
    return 0 if found.equal else FAILED


def _say(text: str) -> None:
    sys.stdout.write(f"{shown(text)}\n")
    sys.stdout.flush()


def _tell(error: Exception, code: int) -> int:
    sys.stderr.write(f"{error}\n")
    return code
