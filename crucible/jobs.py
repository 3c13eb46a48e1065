"""Jobs: a composed configuration becomes a recorded run, and a run is executed, here or in its own process.

A job runs in a process of its own when it is one of a multirun or has several devices: its processes, its
W&B run and its failure stay its own. Ranks and jobs never compose again; they read the recorded config.yaml.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from crucible import config as configuration
from crucible.command_line import describe, wants_tracebacks
from crucible.config import Config, is_child_rank
from crucible.options import ConfigError, suggest
from crucible.run import Held, RunDirectory, write_atomically

MAIN = Path(__file__).resolve().parent.parent / "main.py"
IN_PROCESS = "CRUCIBLE_IN_PROCESS"  # set for the process that is to do the work itself
SWEEP = "CRUCIBLE_SWEEP"  # what the summary of a sweep's job says of the sweep, as JSON
JOB_RECORD = "CRUCIBLE_JOB_RECORD"  # where such a job says which run it was and how it ended
RESUME = "CRUCIBLE_RESUME"  # the training state that all ranks of a run start from
WAIT_FOR_RANK_0_S = 600.0
STARTED = "CRUCIBLE_STARTED"  # when the process was started, whose imports take seconds
HELD = 75  # exit status of a job whose run another live process holds
log = logging.getLogger("crucible")

# what the jobs composed in this process came to
_raised: list[Exception] = []
_statuses: list[int] = []


# from a composed configuration to a run


def run_composed(composed: DictConfig) -> None:
    """Record and run one composed job. What a multirun makes of its jobs is `crucible.sweep`."""
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task)
    HydraConfig.instance().cfg = None  # from here on this is `main.py run=RUN`, for Lightning's launcher too
    job, status = None, 1
    try:
        if composed["task"] == "summary":
            _summary(composed, overrides)
            return
        for option in configuration.SWEEP_OPTIONS:
            if any(o.split("=", 1)[0].split(".")[0].lstrip("+") == option for o in overrides):
                raise ConfigError(
                    f"{option} is an option of sweeps: python main.py -m ...", see="docs/sweeps.md"
                )
        job = examine(composed, overrides)
        forget()
        status = start(job.record(), job.config)
        note_status(status)
    except Exception as error:
        _raised.append(error)
    if JOB_RECORD in os.environ and not is_child_rank():
        reason = str(describe(_raised[-1])[0] or _raised[-1]) if _raised else ""
        path = str(job.run.path) if job else None
        status = HELD if _raised and isinstance(_raised[-1], Held) else status
        content = {"run": path, "status": status, "reason": reason}
        write_atomically(Path(os.environ[JOB_RECORD]), json.dumps(content))


def _summary(composed: DictConfig, overrides: list[str]) -> None:
    """Print what the network costs; needs no data and leaves nothing behind."""
    config = configuration.to_plain(composed)
    configuration.check(config, overrides)
    from crucible.summary import show

    show(config)


def note_status(status: int) -> None:
    """What `exit_status` is to give, unless something was worse."""
    _statuses.append(status)


def exit_status() -> int:
    """Of what was composed in this process: the worst job's status; the error is raised that kept one from starting."""
    raised, statuses = list(_raised), list(_statuses)
    for outcome in (_raised, _statuses):
        outcome.clear()
    if raised:
        raise raised[0]
    return max(statuses, default=0)


@dataclass(frozen=True)
class Job:
    """A composed configuration that can be run, and the run that it is.

    Args:
        run: its directory, which may not be there yet.
        config: plain, checked and resolved.
        overrides: what was typed.
        facts: what the summary says of it from the start.
        steps: optimizer steps of the whole run, where they can be told.
    """

    run: RunDirectory
    config: Config
    overrides: Sequence[str]
    facts: Mapping[str, Any]
    steps: float

    def record(self) -> RunDirectory:
        """Write what the run is, unless that has been done; with `fresh` an earlier one is put aside.

        Raises:
            Held: where a live process holds it.
        """
        if is_child_rank():
            return self.run
        with self.run.locked():
            state = self.run.state()
            if state == "running":
                raise Held(f"{self.run.path}: this run is in progress ({self.run.holder()})")
            if state == "absent" or self.config["fresh"]:
                if state != "absent":
                    _archive(self.run)
                # `fresh` is a command, not a fact of the run
                self.run.record({**self.config, "fresh": False}, list(self.overrides))
                now = {"status": "created", "reason": "", "final": {}, "best": {}, "started": time.time()}
                self.run.update_summary(**now, **self.facts)
        return self.run


def examine(composed: DictConfig, overrides: Sequence[str], swept: Collection[str] | None = None) -> Job:
    """Check and resolve a composed configuration, and find the run that it is. Nothing is written.

    Args:
        composed: by Hydra.
        overrides: what was typed for it.
        swept: the options that differ between the jobs, where it is one of a sweep.

    Raises:
        ConfigError: for whatever cannot run.
    """
    config = configuration.to_plain(composed)
    for option in configuration.SWEEP_OPTIONS:
        config.pop(option)
    configuration.check(config, overrides)
    if config["task"] != "train":
        raise ConfigError(
            f"task={config['task']} works on a recorded run: python main.py run=RUN task={config['task']}",
            "README.md",
        )
    _check_torchrun(config)
    from crucible.build import file_fingerprint
    from losses.distillation import settle_teacher

    data, fingerprint = _read_data(config)
    settled = configuration.resolve(config, data)
    configuration.check(config, overrides)
    contents: dict[str, str | None] = {"data": fingerprint}
    for option, room, key in (
        ("model.init_from", config["model"], "init_from"),
        ("ckpt_path", config, "ckpt_path"),
    ):
        if room[key] is not None:
            contents[option] = file_fingerprint(option, room[key])
            room[key] = str(Path(room[key]).expanduser().resolve())
    if config["model"].get("teacher") is not None:
        config["model"]["teacher"], contents["model.teacher"] = settle_teacher(config)
    _construct(config)
    identity = configuration.identity(config, contents)
    name = f"{identity}-s{config['seed']}"
    run = RunDirectory(
        Path(config["exp_dir"]).expanduser().resolve() / config["data"]["module"]["name"] / name
    )
    if config["user_dir"]:
        config["user_dir"] = str(Path(config["user_dir"]).expanduser().resolve())
    for key in ("data_root_dir", "predict_dir"):
        path = config["data"]["module"].get(key)
        config["data"]["module"][key] = str(Path(path).expanduser().resolve()) if path else path
    facts = {
        "run_id": name, "identity": identity, "seed": config["seed"], "data": config["data"]["module"]["name"],
        "arm": configuration.arm_name(config, overrides, swept), "techniques": sorted(config.get("techniques") or {}),
        "kind": configuration.kind(config), "resolved": settled,
    }  # fmt: skip
    if SWEEP in os.environ:  # this process is a sweep's job on another machine
        facts["sweep"] = json.loads(os.environ[SWEEP])
    return Job(run, config, overrides, facts, configuration.total_steps(config, data))


_read: dict[str, tuple[Any, str]] = {}
_constructed: set[str] = set()


def forget() -> None:
    """Let go of what `examine` keeps for the jobs of a sweep."""
    _read.clear()
    _constructed.clear()


def _key(*nodes: Mapping[str, Any]) -> str:
    """What jobs share that differ by their seed only."""
    return json.dumps([{k: v for k, v in node.items() if k != "seed"} for node in nodes], default=str)


def _read_data(config: Config) -> tuple[Any, str]:
    """The data module and the fingerprint of its data; read once for all jobs of a sweep with the same data."""
    from crucible.build import build_data

    key = _key(config["data"]["module"])
    if key not in _read:
        data = build_data(config)
        data.check()
        _read[key] = data, data.fingerprint()
    data, fingerprint = _read[key]
    return copy.copy(data), fingerprint  # the batch size may be settled on the copy


def _construct(config: Config) -> None:
    """What only the constructors can refuse is refused now, once for all seeds of an arm."""
    from crucible.build import build_model, build_trainer
    from crucible.loggers import check_loggers
    from crucible.summary import check_input

    data = {k: v for k, v in config["data"].items() if k != "module"}
    key = _key(config["model"], data, config["data"]["module"], config["trainer"], config["logger"])
    if key in _constructed:
        return
    check_input(build_model(config, load=False, compile=False), config)
    check_loggers(config["logger"])
    with _quiet_lightning():
        build_trainer(config, Path(config["exp_dir"]), [], [])
    _constructed.add(key)


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without what Lightning says of a trainer that only has to be built, or to evaluate."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _check_torchrun(config: Config) -> None:
    """A launcher that starts the ranks itself must start as many as the configuration asks for."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = configuration.device_count(config["trainer"]) * config["trainer"]["num_nodes"]
    if world != wanted:
        raise ConfigError(
            f"trainer.devices={config['trainer']['devices']}, trainer.num_nodes={config['trainer']['num_nodes']}: "
            f"torchrun started {world} processes, these options ask for {wanted}"
        )


def _archive(run: RunDirectory) -> None:
    number = 1
    while (old := run.path.with_name(f"{run.path.name}.old-{number}")).exists():
        number += 1
    run.path.rename(old)


# running


def externally_launched() -> bool:
    """Whether torchrun or SLURM starts the ranks, so that this process is one of them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def start(run: RunDirectory, config: Config) -> int:
    """Run a recorded run to its end, or resume it; a finished one is left as it is. The exit status."""
    # a child rank of a fresh run may see the finished one that rank 0 is about to put aside
    if run.state() == "finished" and not (is_child_rank() and config["fresh"]):
        if not is_child_rank():
            final = run.summary().get("final", {})
            _say(
                f"{run.path}: finished before ({few(final)}); the command that made it runs it again with fresh=true"
            )
            _warn_of_other_code(run)
        return 0
    if externally_launched():
        return execute(run, config)
    world = configuration.device_count(config["trainer"]) * config["trainer"]["num_nodes"]
    if world > 1 and os.environ.get(IN_PROCESS) != "1":
        return _run_in_own_process(run)
    return execute(run, config)


def few(final: dict[str, float]) -> str:
    """The values that a reader wants first."""
    wanted = [k for k in ("test/acc", "test/mae", "val/acc", "val/loss") if k in final]
    return ", ".join(f"{k} {final[k]:.4f}" for k in wanted[:2])


def _say(text: str) -> None:
    print(text, flush=True)


def _warn_of_other_code(run: RunDirectory) -> None:
    from crucible.tasks import git_state

    before, now = run.summary().get("git") or {}, git_state()
    if before.get("commit") and now.get("commit") and before["commit"] != now["commit"]:
        _say(
            f"note: that run was made by commit {before['commit'][:9]}; the checkout is at {now['commit'][:9]}"
        )


class Process:
    """A recorded run in a process (and a process group) of its own.

    Args:
        run: recorded.
        environment: added to this process's.
        output: where the process's lines go; None: where ours go.
    """

    def __init__(
        self, run: RunDirectory, environment: Mapping[str, str] | None = None, output: Path | None = None
    ) -> None:
        self.run = run
        self._stopped = False
        log_file = run.path / "main.log"
        self._logged = log_file.stat().st_size if log_file.is_file() else 0
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(output.open("ab")) if output else None
            self._process = subprocess.Popen(
                [sys.executable, str(MAIN), f"run={run.path}"],
                env={**os.environ, **(environment or {}), IN_PROCESS: "1", STARTED: str(time.time())},
                start_new_session=True, stdout=stream, stderr=subprocess.STDOUT if output else None,
            )  # fmt: skip

    def signal(self, number: int) -> None:
        """Hand a signal on to the run and its ranks."""
        self._stopped = True
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def ended(self, timeout: float = 0.0) -> bool:
        """Whether it has ended, after waiting for at most `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def outcome(self) -> int:
        """Clean up after its end, record a death that it could not record itself; the exit status."""
        _end_group(self._process.pid)
        run, status = self.run, self._process.returncode
        outcome = run.summary().get("status")
        if outcome not in ("finished", "interrupted", "pruned") and status != HELD:
            reason = (
                _first_error(run, self._logged)
                or (run.summary().get("reason") if outcome == "failed" else "")
                or f"its process ended with status {status}; {run.path / 'main.log'} may say why"
            )
            ended, reason = ("interrupted", "stopped") if self._stopped else ("failed", reason)
            run.update_summary(status=ended, reason=reason, ended=time.time())
            run.release(self._process.pid)
        return status if status >= 0 else 128 - status


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Let `handle` have the signals that stop a run."""
    previous = {n: signal.signal(n, lambda number, frame: handle(number)) for n in STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run_in_own_process(run: RunDirectory) -> int:
    process = Process(run)
    with on_signals(process.signal):
        while not process.ended(60):
            pass
    status = process.outcome()
    if run.summary().get("status") == "interrupted" and status > 128:
        raise SystemExit(status)
    return status


def _end_group(group: int) -> None:
    """No rank outlives its run."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _first_error(run: RunDirectory, since: int) -> str:
    """The first error in main.log after the byte `since`: of several ranks, the one that failed first says why."""
    file = run.path / "main.log"
    if not file.is_file():
        return ""
    lines = file.read_bytes()[since:].decode(errors="replace").splitlines()
    return next((line.split(" ERROR ", 1)[1] for line in lines if " ERROR " in line), "")


def execute(run: RunDirectory, config: Config) -> int:
    """Train this run in this process (one of its ranks); its exit status. Whatever happens is recorded."""
    from callbacks.pruning import Pruned
    from callbacks.recorder import Diverged, Interrupted
    from crucible import tasks
    from crucible.loggers import close_loggers

    first = not is_child_rank()
    if first:
        resume = _find_resume(run, config)
        try:
            run.claim(token=_launch_token(), resume=str(resume or ""))
        except Held as error:
            if os.environ.get(IN_PROCESS) != "1":
                raise
            _say(str(error))
            return HELD
        began = float(os.environ.pop(STARTED, time.time())) - run.summary().get("elapsed_s", 0.0)
        os.environ[RESUME] = str(resume or "")
        run.update_summary(status="running", reason="")
    else:
        resume = _resume_of_rank_0(run)
    sys.argv = [str(MAIN), f"run={run.path}"]  # what Lightning starts for the other ranks
    main_log = _log_to(run, first)
    status, outcome, reason = 1, "failed", ""
    try:
        final = tasks.train(run, config, resume)
        status, outcome = 0, "finished"
        if first:
            _say(f"{few(final)}  ->  {run.path}")
    except Interrupted as error:
        # the ranks stop together: a child that reports failure would have rank 0 killed while it writes
        status, outcome, reason = (error.exit_status if first else 0), "interrupted", str(error)
        if first:
            _say(f"interrupted; the same command, or python main.py run={run.path}, goes on from here")
    except Pruned as error:
        status, outcome, reason = 0, "pruned", str(error)
    except Diverged as error:
        status, reason = (1 if first else 0), str(error)
        if first:
            _report(error, str(error))
    except ConfigError as error:
        status, reason = 2, str(error)
        _report(error, reason)
    except (KeyboardInterrupt, SystemExit) as error:
        status, outcome, reason = 130, "interrupted", f"stopped ({type(error).__name__})"
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        reason = f"{type(error).__name__}: {text}"
        _report(error, f"{reason} (traceback in {run.path / 'main.log'})")
        if wants_tracebacks():
            traceback.print_exc()
    finally:
        for name in _LOGGED:  # what comes after this run in this process is not of this run
            logging.getLogger(name).removeHandler(main_log)
        main_log.close()
        close_loggers(status)
        if first:
            now = time.time()
            run.update_summary(status=outcome, reason=reason, ended=now, elapsed_s=round(now - began, 2))
            run.release()
            if status == 128 + signal.SIGUSR1:
                _requeue()
    return status


def _requeue() -> None:
    """Ask SLURM, whose warning stopped this run, to start the same job again."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", job], check=False)


def _report(error: Exception, text: str) -> None:
    log.error("%s", text)
    log.info("%s", "".join(traceback.format_exception(error)))
    print(f"error: {text}", file=sys.stderr, flush=True)


def _find_resume(run: RunDirectory, config: Config) -> Path | None:
    last = run.checkpoints / "last.ckpt"
    if last.is_file():
        return last
    return Path(config["ckpt_path"]) if config["ckpt_path"] else None


def _launch_token() -> str:
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
             "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")  # fmt: skip
    return "/".join(os.environ.get(n, "") for n in names)


def _resume_of_rank_0(run: RunDirectory) -> Path | None:
    """The state that rank 0 decided to start from."""
    path = os.environ[RESUME] if RESUME in os.environ else _wait_for_claim(run).get("resume", "")
    return Path(path) if path else None


def _wait_for_claim(run: RunDirectory) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_FOR_RANK_0_S
    while time.monotonic() < deadline:
        try:
            claim = json.loads(run.claim_file.read_text(encoding="utf-8"))
            if claim.get("token") == _launch_token():
                return claim
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    raise ConfigError(f"{run.path}: rank 0 did not start this run within {WAIT_FOR_RANK_0_S:.0f} s")


_EXPECTED_WARNINGS = (  # of what Crucible does on purpose
    ".*It is recommended to use .*sync_dist=True.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*LeafSpec.*",
    ".*You have overridden `on_after_batch_transfer`.*",
    ".*Couldn't infer the batch indices.*",
)


_LOGGED = ("crucible", "lightning.pytorch", "lightning.fabric", "py.warnings")


def _log_to(run: RunDirectory, first: bool) -> logging.Handler:
    """Everything to RUN/main.log; to the console warnings only, once."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.captureWarnings(True)
    handler = logging.FileHandler(run.path / "main.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO if first else logging.ERROR)
    handler.addFilter(lambda record: "💡 Tip" not in record.getMessage())  # Lightning's advertisements
    for name in ("lightning", *_LOGGED):
        logger = logging.getLogger(name)
        for console in logger.handlers:
            console.setLevel(logging.WARNING)
        if name in _LOGGED:
            logger.disabled = False  # Hydra's "disabled" logging switches off the loggers it finds
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
    return handler


# on a recorded run

_OWN = ("run", "task", "ckpt_path", "out", "user_dir")
# what may be typed beside run=RUN: for training what leaves the result as it is
_WHILE_TRAINING = (
    "data.module.data_root_dir", "data.module.csv_file", "data.module.num_workers", "data.module.prefetch_factor",
    "data.module.persistent_workers", "data.module.pin_memory", "trainer.accelerator", "trainer.strategy",
    "trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.profiler", "trainer.detect_anomaly",
    "checkpoint", "callbacks.progress", "callbacks.plots", "logger", "test_after_training",
)  # fmt: skip
_WHEN_EVALUATING = ("data.module", "trainer", "metrics", "callbacks", "logger")


def run_recorded(arguments: Sequence[str]) -> int:
    """`run=RUN [task=...] [ckpt_path=...] [option=value ...]`; the exit status."""
    given: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.lstrip("+").partition("=")
        if not equals:
            raise ConfigError(f"{argument}: with run=RUN the arguments are option=value", see="README.md")
        given[name] = value
    task = given.get("task", "train")
    if task not in ("train", "test", "predict"):
        raise ConfigError(
            f"task={task}: must be one of train, test, predict{suggest(task, ['train', 'test', 'predict'])}"
        )
    runs = [RunDirectory(path) for path in _expand(given["run"])]
    configs = [_with_overrides(run, given, task) for run in runs]
    if task == "train":
        if len(runs) > 1:
            raise ConfigError(
                f"run={given['run']} names {len(runs)} runs; only task=test and predict take several"
            )
        if "ckpt_path" in given:
            raise ConfigError(
                "ckpt_path starts a new run from a training state; run=RUN resumes from its last.ckpt"
            )
        if not is_child_rank() and runs[0].state() == "running":
            error = f"{runs[0].path}: this run is in progress ({runs[0].holder()})"
            if os.environ.get(IN_PROCESS) != "1":
                raise Held(error)
            _say(error)
            return HELD
        return start(runs[0], configs[0])
    with _quiet_lightning():
        return _evaluate(task, runs, configs, given)


def _expand(text: str) -> list[str]:
    found: list[str] = []
    for part in text.strip("[]'\"").split(","):
        matches = (
            sorted(p for p in glob.glob(part) if (Path(p) / "config.yaml").is_file())
            if glob.has_magic(part)
            else [part]
        )
        found.extend(matches)
    if not found:
        raise ConfigError(f"run={text}: no run there", see="README.md")
    return found


def _with_overrides(run: RunDirectory, given: dict[str, str], task: str) -> Config:
    """The recorded configuration with what was typed; training takes only what leaves the result as it is."""
    config = run.config()
    user_dir = given.get("user_dir") or config.get("user_dir")
    if user_dir and user_dir not in sys.path:
        sys.path.insert(1, user_dir)
    node = OmegaConf.create(config)
    for name, value in given.items():
        if name in _OWN:
            continue
        known = configuration.select(config, name.rpartition(".")[0]) if "." in name else config
        leaf = name.rpartition(".")[2]
        if not isinstance(known, dict) or leaf not in known:
            raise ConfigError(f"{name}: no such option in the recorded run{suggest(leaf, known or [])}")
        allowed = _WHILE_TRAINING if task == "train" else _WHEN_EVALUATING
        if not any(name == option or name.startswith(f"{option}.") for option in allowed):
            changeable = f"run=RUN task={task} takes {', '.join(allowed)}"
            if task == "train":
                changeable = (
                    "run=RUN resumes what was recorded; to change it, start a new run "
                    f"(with ckpt_path={run.checkpoints / 'last.ckpt'} to start from this one's state)"
                )
            raise ConfigError(f"{name}={value}: {changeable}", see="README.md")
        OmegaConf.update(node, name, yaml.safe_load(value))
        if name == "metrics":
            OmegaConf.update(node, "model.metrics", yaml.safe_load(value))
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    if len(given) > 1 and not is_child_rank():
        configuration.check(plain, [])  # type: ignore[arg-type]
        configuration.resolve_monitor(plain)  # type: ignore[arg-type]
    return plain  # type: ignore[return-value]


def _evaluate(task: str, runs: list[RunDirectory], configs: list[Config], given: dict[str, str]) -> int:
    from crucible import tasks

    chosen = [tasks.pick_checkpoint(run, given.get("ckpt_path")) for run in runs]
    triples = list(zip(runs, configs, chosen, strict=True))
    out = Path(given["out"]) if "out" in given else None
    for _, config, _ in triples:
        config["callbacks"] = {k: v for k, v in config["callbacks"].items() if v}
    names = ", ".join(f"{run.path.name}/{file.name}" for run, _, file in triples)
    if task == "predict":
        file = out or runs[0].path / (
            "predictions.csv" if len(runs) == 1 else f"predictions-of-{len(runs)}-runs.csv"
        )
        _say(f"predictions of {names}  ->  {tasks.predict(triples, file)}")
        return 0
    if len(runs) == 1:
        sys.argv = [str(MAIN), *(f"{k}={v}" for k, v in given.items())]
        final = tasks.test(runs[0], configs[0], chosen[0])
        written = runs[0].path / "test.json"
    else:
        final = tasks.test_ensemble(triples, runs[0].path)
        written = out or runs[0].path.parent / f"ensemble-of-{len(runs)}-runs.json"
        record = {
            "runs": [str(run.path) for run in runs],
            "checkpoints": [c.name for c in chosen],
            "metrics": final,
        }
        write_atomically(written, json.dumps(record, indent=2) + "\n")
    if not is_child_rank():
        _say(f"test of {names}")
        for name, value in final.items():
            if name.startswith("test/"):
                _say(f"  {name:<24} {value:.4f}")
        _say(f"  ->  {written}")
    return 0
