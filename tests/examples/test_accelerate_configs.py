"""The files of `examples/accelerate` are what accelerate reads; those for GPUs are checked as far as a CPU allows."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.examples.local import EXAMPLES

FOLDER = EXAMPLES / "accelerate"
KINDS = {
    "cpu_ddp.yaml": DistributedType.MULTI_GPU,
    "multi_gpu.yaml": DistributedType.MULTI_GPU,
    "fsdp2.yaml": DistributedType.FSDP,
    "deepspeed_zero2.yaml": DistributedType.DEEPSPEED,
    "deepspeed_zero3.yaml": DistributedType.DEEPSPEED,
}


def launch_arguments(path: Path):
    """Return what `accelerate launch --config_file` makes of a file."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    return _validate_launch_command(args)[0]


def test_every_file_is_known_here():
    assert {path.name for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / name))
    assert config.distributed_type is KINDS[name] and config.num_processes > 1
    assert config.use_cpu is ("cpu" in name)
    assert config.mixed_precision == ("no" if "cpu" in name else "bf16")


def test_fsdp_reaches_the_processes_in_its_second_version():
    environment = prepare_multi_gpu_env(launch_arguments(FOLDER / "fsdp2.yaml"))
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true" and environment["FSDP_OFFLOAD_PARAMS"] == "false"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_reaches_the_processes_and_leaves_to_trainer_what_is_its(stage):
    args = launch_arguments(FOLDER / f"deepspeed_zero{stage}.yaml")
    assert args.use_deepspeed
    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(args)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
