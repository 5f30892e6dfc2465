"""Launchers start what they name, contradict no recipe, and meet again after a restart."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from torch.distributed import TCPStore

from condot.core.process import available_cpus
from condot.models.dit.spec import DiTConfig
from condot.pipeline.config.schema import Config, GuardConfig, TrainConfig
from condot.pipeline.launch import distributed, launcher_env, rendezvous

ACCELERATE = ROOT / "configs" / "accelerate"
MEMBER = str(ROOT / "tests" / "member.py")
TORCHRUN = ("-m", "torch.distributed.run")
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")


def recipe(**train):
    checkpointing = train.pop("gradient_checkpointing", False)
    return Config(train=TrainConfig(**train), model=DiTConfig(gradient_checkpointing=checkpointing))


# --- what the launcher says against the recipe

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_RESHARD_AFTER_FORWARD": "true"}
HYBRID = FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}


@pytest.mark.parametrize(
    ("said", "train", "names"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {"mixed_precision": "no"},
            ("ACCELERATE_MIXED_PRECISION=bf16", "train.mixed_precision=no"),
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"mixed_precision": "bf16"}, ("=fp16", "=bf16")),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "accumulation_steps=1")),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "train.compile=false")),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, {"compile": True}, ("ACCELERATE_DYNAMO_BACKEND=EAGER", "train.compile=true")),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, ("ACCELERATE_USE_DEEPSPEED=true", "fsdp2.yaml")),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, ("ACCELERATE_USE_MEGATRON_LM=true",)),
        ({"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_FP8_BACKEND": "TE"}, {}, ("ACCELERATE_FP8_BACKEND=TE", "torchao")),
        (FSDP, {"sharding": "none"}, ("ACCELERATE_USE_FSDP=true", "train.sharding=none")),
        (HYBRID, {"sharding": "full"}, ("HYBRID_SHARD", "train.sharding=full")),
        (FSDP | {"FSDP_VERSION": "1"}, {}, ("FSDP_VERSION=1", "fsdp_version: 2")),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, ("FSDP_VERSION=1",)),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "2"}, {}, ("FSDP_SHARDING_STRATEGY=SHARD_GRAD_OP",)),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, ("FSDP_RESHARD_AFTER_FORWARD=false",)),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, ("FSDP_OFFLOAD_PARAMS=true",)),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, ("FSDP_ACTIVATION_CHECKPOINTING=true", "gradient_checkpointing=false")),
        (FSDP | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, ("PARALLELISM_CONFIG_TP_SIZE=2",)),
    ],
)
def test_a_launcher_that_contradicts_the_recipe_is_named(said, train, names):
    (found,) = launcher_env.find_conflicts(recipe(**train), said)
    assert all(name in found for name in names) and "\n" not in found


@pytest.mark.parametrize(
    ("said", "train"),
    [
        ({}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"mixed_precision": "bf16"}),  # what Accelerate says when nobody told it anything
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "auto"}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, {"gradient_accumulation_steps": 2}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, {"compile": True}),
        ({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, {"sharding": "none"}),
        (FSDP, {"sharding": "full"}),
        (FSDP, {"sharding": "hybrid"}),
        (HYBRID, {"sharding": "hybrid"}),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"gradient_checkpointing": True}),
    ],
)
def test_a_launcher_that_agrees_is_heard(said, train):
    assert launcher_env.find_conflicts(recipe(**train), said) == []


def test_every_contradiction_is_told_at_once(monkeypatch):
    for name, value in (FSDP | {"FSDP_VERSION": "1", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"ACCUMULATION_STEPS=3 .*; FSDP_VERSION=1"):
        distributed.init_distributed(recipe())


@pytest.mark.parametrize(
    ("said", "asked", "known"),
    [
        ({}, None, "none"),
        ({}, "hybrid", "hybrid"),
        (FSDP, None, "full"),
        (HYBRID, None, "hybrid"),
        *((FSDP | {"FSDP_SHARDING_STRATEGY": number}, None, name) for number, name in (("1", "full"), ("4", "hybrid"))),
        (FSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, None, "hybrid"),
        (FSDP, "hybrid", "hybrid"),
    ],
)
def test_sharding_is_the_recipes_or_as_launched_and_accelerate_forgets_it(monkeypatch, said, asked, known):
    for name, value in (said | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "PARALLELISM_CONFIG_TP_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    config = recipe(sharding=asked)
    assert distributed.resolve_sharding(config) == known
    launcher_env.consume_launcher_env()
    unsaid = ("FSDP_", "ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_", "PARALLELISM_CONFIG_")
    assert not [name for name in os.environ if name.startswith(unsaid)]
    assert distributed.resolve_sharding(config) == known, "remembered once the variables are gone"
    launcher_env.consume_launcher_env()
    assert distributed.resolve_sharding(recipe()) == "none", "the next run in this process was launched without"


def test_precisions_that_the_hardware_lacks(monkeypatch):
    """fp16 on a CPU, fp8 without a GPU, with an old one, without its library, with sharded weights; and then nothing is wrong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for precision, rule in (("fp16", "Use bf16"), ("fp8", "this machine has no GPU")):
        with pytest.raises(ValueError, match=rule):
            distributed.check_precision(precision)
        with pytest.raises(ValueError, match=rule):
            distributed.init_distributed(recipe(mixed_precision=precision))
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        with pytest.raises(ValueError, match=rule):
            distributed.init_distributed(recipe())
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(distributed, "is_torchao_available", lambda: False)
    distributed.check_precision("fp16")
    with pytest.raises(ValueError, match=r"A100 has 8\.0"):
        distributed.check_precision("fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(ValueError, match="pip install torchao"):
        distributed.check_precision("fp8")
    monkeypatch.setattr(distributed, "is_torchao_available", lambda: True)
    with pytest.raises(ValueError, match=r"train\.sharding=full"):
        distributed.check_precision("fp8", "full")
    distributed.check_precision("fp8")


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed._local_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"8 processes were started on a machine that shows 4 GPU.*start 4"):
        distributed._local_device()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # SLURM shows each task its own, as number 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed._local_device() == torch.device("cuda", 0)


def test_ranks_that_see_other_data_are_named(monkeypatch):
    """Rank 1 of three; the first and the last see the same."""
    monkeypatch.setattr(distributed, "gather_object", lambda mine: [*mine, "b" * 64, *mine])
    with pytest.raises(ValueError, match=r"data.shards is a{12} on rank 0 and b{12} on rank 1"):
        distributed.check_same_data("data.shards", "a" * 64)
    monkeypatch.setattr(distributed, "gather_object", lambda mine: mine * 3)
    distributed.check_same_data("data.shards", "a" * 64)


def test_processes_of_a_machine_share_its_processors(monkeypatch):
    """Eight of them: all for one process, as many for each of several, and never none; a number that is asked for is taken."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    for ranks, each in (("1", 8), ("3", 2), ("4", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert distributed._threads_per_process() == each
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(distributed, "_init_process_group", lambda timeout: None)
    monkeypatch.setattr(distributed, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.join_process_group()
    assert taken == [], "alone: torch's own number"
    distributed.join_process_group(3)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    distributed.join_process_group()
    distributed.join_process_group(5)
    assert taken == [3, 2, 5]


def test_processors_are_those_that_may_be_used_or_where_no_affinity_exists_all(monkeypatch):
    """A Mac has no affinity, and Python there no function of the name; it may not know the number either."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cpus() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1


def test_torch_waits_longer_than_the_watch():
    """Else torch ends the run with its own words before the watch names the rank."""
    assert distributed._collective_timeout(0) == distributed.A_MONTH
    default = GuardConfig().hang_seconds
    assert distributed._collective_timeout(default).total_seconds() > 1.15 * default + 100


def test_tasks_of_srun_that_do_not_know_each_other(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match=r"SLURM_STEP_NUM_TASKS=4: .*docs/cluster.md"):
        distributed.check_launcher()
    monkeypatch.setenv("WORLD_SIZE", "4")
    distributed.check_launcher()


# --- launch files


@pytest.mark.parametrize(
    ("name", "processes", "nodes", "known"),
    [("cpu2", 2, 1, "none"), ("cpu2_fsdp", 2, 1, "full"), ("ddp8", 8, 1, "none"), ("fsdp2", 8, 1, "full"), ("multinode", 8, 2, "none")],
)
def test_launch_files_say_what_they_are_named(name, processes, nodes, known):
    """Through Accelerate's own reading of them, up to the point at which it would start processes."""
    args = launch_command_parser().parse_args(["--config_file", str(ACCELERATE / f"{name}.yaml"), "train.py"])
    args, _, _ = _validate_launch_command(args)
    said = prepare_multi_gpu_env(args)
    assert args.multi_gpu or args.use_fsdp, "the branch of Accelerate that starts every process"
    assert (args.nproc_per_node, getattr(args, "nnodes", "1")) == (str(processes), str(nodes))
    said = {key: value for key, value in said.items() if key not in os.environ}
    assert (
        launcher_env.find_conflicts(recipe(), said) == [] == launcher_env.find_conflicts(recipe(mixed_precision="bf16", compile=True), said)
    )
    assert (launcher_env._sharding_from_env(said) or "none") == known


# --- the rendezvous


@pytest.fixture
def server():
    """A store that lives from attempt to attempt, as an agent's does."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


def attempt(server, ranks, world, seconds=10.0):
    """What each of these ranks, a thread with its own connection, got from its rendezvous: a number or an error."""
    found = {}

    def act(rank):
        store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
        patience = timedelta(seconds=seconds)
        try:
            call = (store, world, patience, "here")
            found[rank] = (
                rendezvous._serve_rendezvous(*call) if rank == 0 else rendezvous._join_rendezvous(store, rank, world, patience, "here")
            )
        except ValueError as error:
            found[rank] = error

    threads = [threading.Thread(target=act, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_attempt_has_its_own_number(server):
    """Twice over one store: what the first left there is no answer to the second."""
    assert attempt(server, range(3), 3) == {0: 1, 1: 1, 2: 1}
    assert attempt(server, (2, 1, 0), 3) == {0: 2, 1: 2, 2: 2}


def test_a_dead_attempt_is_not_joined(server):
    """Rank 1 said hello and died, rank 0 answered and died: those who come later take neither for living."""
    server.set("condot/attempts", "4")
    server.set("condot/hello/1", "dead")
    server.set("condot/welcome/1", "dead 4")
    server.set("condot/has/1", "4")
    server.set("condot/4/begun", "")
    late = {}
    thread = threading.Thread(target=lambda: late.update(attempt(server, (1,), 2)))
    first = threading.Thread(target=lambda: late.update(attempt(server, (0,), 2)))
    first.start()
    time.sleep(0.5)
    assert not late, "rank 0 went on with a rank that is dead"
    thread.start()
    first.join()
    thread.join()
    assert late == {0: 5, 1: 5}


def test_who_followed_a_dying_rank_0_follows_the_next(server):
    """On two machines an old rank 0 may answer while the new one starts."""
    found = {}
    thread = threading.Thread(target=lambda: found.update(attempt(server, (1,), 2)))
    thread.start()
    while not server.check(["condot/hello/1"]):
        time.sleep(0.01)
    number = server.add("condot/attempts", 1)
    server.set("condot/welcome/1", f"{server.get('condot/hello/1').decode()} {number}")  # and then it died
    while not server.check(["condot/has/1"]):
        time.sleep(0.01)
    found |= attempt(server, (0,), 2)
    thread.join()
    assert found == {0: 2, 1: 2}


def test_ranks_that_do_not_come_are_named(server):
    found = attempt(server, (0, 2), 4, seconds=0.5)
    assert "2 of 4 processes did not come to here in 0 s: rank 1, 3." in str(found[0]) and "others did not come" in str(found[2])
    found = attempt(server, (1,), 4, seconds=0.5)
    assert "rank 1 of 4 waited 0 s at here: rank 0 did not come" in str(found[1])
    (error,) = attempt(server, (0,), 1000, seconds=0.5).values()
    assert "rank 1, 2, 3, 4, 5, 6, 7, 8, ..." in str(error)


def test_a_port_that_is_taken_and_one_where_nobody_is(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ValueError, match=rf"MASTER_PORT={port}: rank 0 of 2 could not meet the others there \(.*in use.*give another port"
        ):
            rendezvous.next_rendezvous(timedelta(seconds=1))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=rf"MASTER_PORT={port}: rank 1 of 2 .*is rank 0 started"):
        rendezvous.next_rendezvous(timedelta(seconds=1))


# --- on several processes


def start(*words, **environment):
    """A launcher in its own process group, so that a signal reaches it alone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def done(folder):
    """What each rank wrote at its end: the size of its world, the attempt's number, the sharding."""
    return {int(path.name[5:]): path.read_text().split() for path in folder.glob("done-*")}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("words", "processes", "known"),
    [
        ((*TORCHRUN, "--standalone", "--nproc_per_node=1"), 1, "none"),
        ((*TORCHRUN, "--standalone", "--nproc_per_node=2"), 2, "none"),
        ((*TORCHRUN, "--standalone", "--nproc_per_node=4"), 4, "none"),
        ((*LAUNCH, str(ACCELERATE / "cpu2.yaml")), 2, "none"),
        ((*LAUNCH, str(ACCELERATE / "cpu2_fsdp.yaml")), 2, "full"),
        ((*LAUNCH, str(ACCELERATE / "ddp8.yaml")), 8, "none"),
        ((*LAUNCH, str(ACCELERATE / "fsdp2.yaml")), 8, "full"),
        ((*LAUNCH, str(ACCELERATE / "ddp8.yaml"), "--num_processes=2"), 2, "none"),
    ],
)
def test_a_launcher_starts_the_processes_that_it_names(tmp_path, words, processes, known):
    launched = start(*words, MEMBER, str(tmp_path))
    _, err = launched.communicate(timeout=300)
    assert launched.returncode == 0, err[-2000:]
    assert done(tmp_path) == {rank: [str(processes), "1", known] for rank in range(processes)}


def nodes(kind, port, folder, *more):
    """Two launchers of two processes, as on two machines."""
    words = {
        "static": (*TORCHRUN, "--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"),
        "c10d": (
            *TORCHRUN,
            "--nnodes=2",
            "--nproc_per_node=2",
            "--rdzv_backend=c10d",
            "--rdzv_id=one",
            f"--rdzv_endpoint=localhost:{port}",
        ),
        "accelerate": (*LAUNCH, str(ACCELERATE / "multinode.yaml"), "--num_processes=4", f"--main_process_port={port}"),
    }[kind]
    number = {"static": "--node_rank={}", "accelerate": "--machine_rank={}"}
    restarts, more = ([more[0]], more[1:]) if more else ([], ())
    return [
        start(*words, *([number[kind].format(node)] if kind in number else []), *restarts, MEMBER, str(folder), *more) for node in (0, 1)
    ]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["static", "c10d", "accelerate"])
def test_two_launchers_of_two_processes_are_one_job(tmp_path, kind):
    for one in nodes(kind, free_port(), tmp_path):
        _, err = one.communicate(timeout=300)
        assert one.returncode == 0, err[-2000:]
    assert done(tmp_path) == {rank: ["4", "1", "none"] for rank in range(4)}


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_two_launchers_restart_a_job_of_which_a_rank_was_killed(tmp_path, kind):
    """Each agent counts its own restarts, and not all of them: the number is the processes' own."""
    for one in nodes(kind, free_port(), tmp_path, "--max_restarts=4", "--fault=die:3:1"):
        _, err = one.communicate(timeout=400)
        assert one.returncode == 0, err[-2000:]
    found = done(tmp_path)
    assert len(found) == 4 and len({tuple(words) for words in found.values()}) == 1 and int(found[0][1]) > 1


@pytest.mark.faults
def test_a_killed_rank_is_restarted_twenty_times_of_twenty(tmp_path):
    launched = start(*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max_restarts=20", MEMBER, str(tmp_path), "--fault=die:1:20")
    _, err = launched.communicate(timeout=1500)
    assert launched.returncode == 0, err[-2000:]
    assert done(tmp_path) == {0: ["2", "21", "none"], 1: ["2", "21", "none"]}
