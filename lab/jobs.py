"""Jobs: a composed configuration becomes a recorded run, and a run is executed, here or in its own process.

A job runs in a process of its own when it is one of a multirun or has several devices: its processes, its
W&B run and its failure stay its own. Ranks and jobs never compose again; they read the recorded config.yaml.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from callbacks.checkpoints import tidy
from callbacks.pruning import Pruned
from callbacks.recorder import Diverged, Interrupted
from crucible import configuration
from crucible.command_line import describe
from crucible.configuration import Config
from crucible.files import write_atomically
from crucible.handover import pass_on, received
from crucible.loggers import close_loggers
from crucible.machine import is_child_rank, world_size
from crucible.metrics import headline
from crucible.options import ConfigError, suggest
from crucible.run import Held, RunDirectory
from crucible.writing import Unwritable
from lab import config as checking
from lab import tasks
from lab.config import SWEEP_OPTIONS
from lab.experiment import Examiner, Job, check_goes_on, quiet_lightning
from lab.processes import HELD, MAIN, Process, on_signals
from lab.states import find_state
from lab.summary import print_summary

WAIT_FOR_RANK_0_S = 600.0
log = logging.getLogger("crucible")


# from a composed configuration to a run


def run_composed(composed: DictConfig) -> int:
    """Record and run one composed job; the exit status. What a multirun makes of its jobs is `lab.sweeps`.

    Raises:
        ConfigError: for whatever cannot run.
    """
    overrides = list(HydraConfig.get().overrides.task)
    HydraConfig.instance().cfg = None  # from here on this is `main.py run=RUN`, for Lightning's launcher too
    if composed["task"] == "summary":
        config = configuration.to_plain(composed)
        checking.check(config, overrides)
        print_summary(config)
        return 0
    for option in SWEEP_OPTIONS:
        if any(o.split("=", 1)[0].split(".")[0].lstrip("+") == option for o in overrides):
            raise ConfigError(f"{option} is an option of sweeps: python main.py -m ...", see="docs/sweeps.md")
    job: Job | None = None
    try:
        job = Examiner().examine(composed, overrides)
        status = start(job.record(), job.config)
    except Exception as error:
        _tell_the_sweep(job, HELD if isinstance(error, Held) else 1, str(describe(error)[0] or error))
        raise
    _tell_the_sweep(job, status)
    return status


def _tell_the_sweep(job: Job | None, status: int, reason: str = "") -> None:
    """A sweep's job on another machine says which run it was and how it ended."""
    record = received().record
    if record is not None and not is_child_rank():
        content = {"run": str(job.run.path) if job else None, "status": status, "reason": reason}
        write_atomically(Path(record), json.dumps(content))


# running


def _say(text: str) -> None:
    print(text, flush=True)


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
            tidy(run.checkpoints, config["checkpoint"]["keep"])  # its process may have been killed before
            summary = run.summary()
            again = "the command that made it runs it again with fresh=true"
            by = f"; {summary['recognised']}" if "recognised" in summary else ""
            _say(f"{run.path}: finished before ({headline(summary.get('final', {}))}{by}); {again}")
            _warn_of_other_code(run)
        return 0
    if not is_child_rank():
        check_goes_on(run, config)
    if externally_launched():
        return execute(run, config)
    if world_size(config["trainer"]) > 1 and not received().does_the_work:
        return _run_in_own_process(run)
    return execute(run, config)


def _warn_of_other_code(run: RunDirectory) -> None:
    before, now = run.summary().get("git") or {}, tasks.git_state()
    if before.get("commit") and now.get("commit") and before["commit"] != now["commit"]:
        _say(
            f"note: that run was made by commit {before['commit'][:9]}; the checkout is at {now['commit'][:9]}"
        )


def _run_in_own_process(run: RunDirectory) -> int:
    process = Process(run)
    with on_signals(process.signal):
        while not process.ended(60):
            pass
    status = process.outcome()
    if run.summary().get("status") == "interrupted" and status > 128:
        raise SystemExit(status)
    return status


def execute(run: RunDirectory, config: Config) -> int:
    """Train this run in this process (one of its ranks); its exit status. Whatever happens is recorded."""
    first = not is_child_rank()
    if first:
        resume, said = _find_resume(run, config)
        try:
            run.claim(token=_launch_token(), resume=str(resume or ""))
        except Held as error:
            if not received().does_the_work:
                raise
            _say(str(error))
            return HELD
        began = (received().started or time.time()) - run.summary().get("elapsed_s", 0.0)
        pass_on(resume=str(resume or ""))
        try:
            run.update_summary(status="running", reason="")
            if said:
                _say(f"note: {said}")
                run.update_summary(recovered=[*run.summary().get("recovered", []), said])
        except OSError:
            run.release()
            raise
    else:
        resume, said = _resume_of_rank_0(run), ""
    sys.argv = [str(MAIN), f"run={run.path}"]  # what Lightning starts for the other ranks
    main_log = _log_to(run, first)
    if said:
        log.warning("%s", said)
    status, outcome, reason = 1, "failed", ""
    try:
        final = tasks.train(run, config, resume)
        status, outcome = 0, "finished"
        if first:
            _say(f"{headline(final)}  ->  {run.path}")
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
    except Unwritable as error:
        status, reason = (1 if first else 0), str(error)  # all ranks have it, rank 0 says it
        if first:
            _report(error, reason)
    except (KeyboardInterrupt, SystemExit) as error:
        status, outcome, reason = 130, "interrupted", f"stopped ({type(error).__name__})"
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        reason = f"{type(error).__name__}: {text}"
        _report(error, f"{reason} (traceback in {run.path / 'main.log'})")
        if received().tracebacks:
            traceback.print_exc()
    finally:
        for name in _LOGGED:  # what comes after this run in this process is not of this run
            logging.getLogger(name).removeHandler(main_log)
        with contextlib.suppress(OSError):  # lines that a full disk has not taken
            main_log.close()
        close_loggers(status)
        if first:
            now = time.time()
            try:
                run.update_summary(status=outcome, reason=reason, ended=now, elapsed_s=round(now - began, 2))
                if outcome in ("finished", "pruned"):
                    tidy(run.checkpoints, config["checkpoint"]["keep"] if outcome == "finished" else "last")
            except OSError as error:  # without it the next start takes the run as unfinished, as it is
                if not status:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                status = status or 1
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


def _find_resume(run: RunDirectory, config: Config) -> tuple[Path | None, str]:
    """`find_state`; that there is none is recorded."""
    try:
        return find_state(run, config)
    except ConfigError as error:
        if run.state() != "running":
            run.update_summary(status="failed", reason=str(error))
        raise


def _launch_token() -> str:
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
             "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")  # fmt: skip
    return "/".join(os.environ.get(n, "") for n in names)


def _resume_of_rank_0(run: RunDirectory) -> Path | None:
    """The state that rank 0 decided to start from."""
    path = received().resume
    if path is None:
        path = _wait_for_claim(run).get("resume", "")
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


class _RunLog(logging.FileHandler):
    """A log that loses lines where the disk is full, which what trains will say, instead of printing tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _log_to(run: RunDirectory, first: bool) -> logging.Handler:
    """Everything to RUN/main.log; to the console warnings only, once."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.captureWarnings(True)
    handler = _RunLog(run.path / "main.log", encoding="utf-8")
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
    known = ["train", *tasks.OF_TRAINED]
    if task not in known:
        raise ConfigError(f"task={task}: must be one of {', '.join(known)}{suggest(task, known)}")
    runs = [RunDirectory(path) for path in _expand(given["run"])]
    configs = [_with_overrides(run, given, task) for run in runs]
    if task == "train":
        if len(runs) > 1:
            raise ConfigError(
                f"run={given['run']} names {len(runs)} runs; only task={' and '.join(tasks.OF_TRAINED)} take several"
            )
        if "ckpt_path" in given:
            raise ConfigError(
                "ckpt_path starts a new run from a training state; run=RUN resumes from its last.ckpt"
            )
        if not is_child_rank() and runs[0].state() == "running":
            error = f"{runs[0].path}: this run is in progress ({runs[0].holder()})"
            if not received().does_the_work:
                raise Held(error)
            _say(error)
            return HELD
        return start(runs[0], configs[0])
    with quiet_lightning():
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
        if name == "data.module.class_map" and isinstance(known, dict):
            known.setdefault(leaf, None)  # the configuration of an older run does not state it
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
        checking.check(plain, [], typed=given)  # type: ignore[arg-type]
        checking.resolve_monitor(plain)  # type: ignore[arg-type]
    return plain  # type: ignore[return-value]


def _evaluate(task: str, runs: list[RunDirectory], configs: list[Config], given: dict[str, str]) -> int:
    chosen = [run.pick_checkpoint(given.get("ckpt_path")) for run in runs]
    for config in configs:
        config["callbacks"] = {k: v for k, v in config["callbacks"].items() if v}
    sys.argv = [str(MAIN), *(f"{k}={v}" for k, v in given.items())]  # for Lightning's launcher of ranks
    tasks.OF_TRAINED[task](
        list(zip(runs, configs, chosen, strict=True)), Path(given["out"]) if "out" in given else None
    )
    return 0
