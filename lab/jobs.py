"""Jobs: a composed configuration becomes a recorded run, and a run is executed, here or in its own process.

A job runs in a process of its own when it is one of a multirun or has several devices: its processes, its
W&B run and its failure stay its own. Ranks and jobs never compose again; they read the recorded config.yaml.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from callbacks.checkpoints import tidy
from callbacks.pruning import Pruned
from callbacks.range_test import RangeOptions
from callbacks.recorder import Diverged, Interrupted
from crucible import configuration
from crucible.command_line import as_typed, command, describe, explain, option, parse, typed_here, unquoted
from crucible.configuration import Config
from crucible.console import columns, fitted, say
from crucible.files import folders_named, missing, write_atomically
from crucible.handover import pass_on, received
from crucible.launch import job_here, launch, left_over, meeting_point, settle, token
from crucible.liveness import stopping_signals
from crucible.loggers import close_loggers
from crucible.machine import is_child_rank, is_out_of_memory, world_size
from crucible.masking import masked
from crucible.memory import worker_died
from crucible.metrics import headline
from crucible.options import ConfigError, check_value, read_options, suggest
from crucible.run import Held, RunDirectory
from crucible.trust import judge
from crucible.writing import Unwritable
from lab import config as checking
from lab import tasks
from lab.build import alone
from lab.config import SWEEP_OPTIONS
from lab.experiment import Examiner, Job, check_goes_on, complete, quiet_lightning
from lab.given import Given, each_given, record_given
from lab.packing import pack
from lab.processes import HELD, MAIN, Process, on_signals, run_command
from lab.ranks import (
    FOLLOW_S,
    SAVE_S,
    SAY_AFTER_S,
    WAIT_S,
    Cause,
    Ranks,
    clear_away_earlier,
    end_others,
    end_with_children,
    end_with_parent,
    follows,
    go_to_meeting,
    open_meeting,
    start_others,
)
from lab.recorded import EVALUATION_OPTIONS, EXPORT_OPTIONS, completed
from lab.states import find_state
from lab.summary import print_summary
from lab.tuning import tune
from models.views import views_asked

_SAID = (ConfigError, Diverged, Unwritable)  # errors whose text says all that the user needs
log = logging.getLogger("crucible")


# from a composed configuration to a run


def run_composed(composed: DictConfig) -> int:
    """Record and run one composed job; the exit status. What a multirun makes of its jobs is `lab.sweeps`.

    Raises:
        ConfigError: for whatever cannot run.
    """
    overrides = list(HydraConfig.get().overrides.task)
    HydraConfig.instance().cfg = None  # from here on this is `main.py run=RUN`
    if composed["task"] == "summary":
        config = configuration.to_plain(composed, overrides)
        checking.check(config, overrides)
        print_summary(config)
        return 0
    if composed["task"] == "pack":
        config = configuration.to_plain(composed, overrides)
        checking.check(config, overrides)
        return pack(config)
    if composed["task"] == "tune":
        return _tune(composed, overrides)
    if composed["task"] in tasks.OF_TRAINED:
        return _use_given(configuration.to_plain(composed), overrides)
    for override in overrides:
        if (name := override.split("=", 1)[0].split(".")[0].lstrip("+~")) in SWEEP_OPTIONS:
            raise ConfigError(
                f"{override}: {name} is an option of sweeps: python main.py -m ...", see="docs/sweeps.md"
            )
    _take_part(OmegaConf.to_container(composed["trainer"], resolve=True))  # type: ignore[arg-type]
    job: Job | None = None
    try:
        job = Examiner().examine(composed, overrides)
        run = job.record()
        _tell_the_sweep(job, None)
        status = start(run, job.config)
    except Exception as error:
        _tell_the_sweep(job, HELD if isinstance(error, Held) else 1, str(describe(error)[0] or error))
        raise
    _tell_the_sweep(job, status)
    return status


def _tune(composed: DictConfig, overrides: Sequence[str]) -> int:
    """`task=tune`: the range test of what the command would train; the status."""
    _take_part(OmegaConf.to_container(composed["trainer"], resolve=True))  # type: ignore[arg-type]
    job = Examiner().examine(composed, overrides)
    options = read_options(RangeOptions, OmegaConf.to_container(composed["tune"], resolve=True), "tune")  # type: ignore[arg-type]
    if composed["model"]["compile"] is None:  # it pays in long runs, and changes no number
        job.config["model"]["compile"] = False
    trainer = job.config["trainer"]
    with _beside_the_others(typed_here(), trainer, world_size(trainer) > 1):
        tune(job, options)
    return 0


def _use_given(config: Config, overrides: Sequence[str]) -> int:
    """`task=test` or `task=predict` of weights from elsewhere: recorded, and evaluated as a run is; the status."""
    every = each_given(config, overrides)
    if "" in every:
        given = record_given(config, overrides)
        for line in given.said:
            say(line)
        try:
            return run_recorded([option("run", given.run.path), *given.beside])
        finally:
            _let_go(given)
    if config["task"] != "test" or isinstance(config["data"]["module"].get("data_root_dir"), list):
        raise ConfigError(
            f"task={config['task']}: a list of weights is for task=test on one folder", "docs/weights.md"
        )
    recorded: list[Given] = []

    def runs_of(one: Config, typed: Sequence[str]) -> tasks.Runs:
        for earlier in recorded[-1:]:
            _let_go(earlier)
        recorded.append(given := record_given(one, typed))
        for line in given.said:
            say(line)
        told = _read_arguments([option("run", given.run.path), *given.beside])
        found = _to_evaluate([given.run], told, "test", _asked(told, "test"))
        return [(run, alone(config), checkpoint) for run, config, checkpoint in found]

    _take_part(config["trainer"], 1)
    if world_size(config["trainer"]) > 1:
        say(
            f"note: trainer.devices={config['trainer']['devices']}: a list of weights is tested on one device"
        )
    out = Path(config["out"]).expanduser() if config.get("out") else None
    with quiet_lightning():
        try:
            rows = {name: partial(runs_of, *one) for name, one in every.items()}
            return tasks.test_on(rows, out, "weights")
        finally:
            for last in recorded[-1:]:
                _let_go(last)


def _let_go(given: Given) -> None:
    if not given.keep:
        for file in given.run.checkpoints.glob("*.ckpt"):
            file.unlink()


def _tell_the_sweep(job: Job | None, status: int | None, reason: str = "") -> None:
    """A sweep's job on another machine says which run it is, and how it ended (None: it has begun)."""
    record = received().record
    if record is not None and not is_child_rank():
        content = {"run": str(job.run.path) if job else None, "status": status, "reason": reason}
        write_atomically(Path(record), json.dumps(content))


# running


def _take_part(trainer: Mapping[str, Any], processes: int | None = None) -> None:
    """Find this process's place among those of its run; say what of the environment counts for nothing.

    Raises:
        ConfigError: where a launcher started others than the run asks for.
    """
    settle(trainer, world_size(trainer) if processes is None else processes)
    if names := left_over():
        say(f"note: {', '.join(names)} in the environment: of no launcher that is known here, and left alone")
    rank_zero_only.rank = launch().rank  # type: ignore[attr-defined]  # Lightning has read the variables by itself


def start(run: RunDirectory, config: Config, typed: Sequence[str] = ()) -> int:
    """Run a recorded run to its end, or resume it; a finished one is left as it is. The exit status.

    Args:
        run: recorded.
        config: its configuration, with what was typed.
        typed: the options beside `run=RUN`, for the processes that this one starts.
    """
    # a child rank of a fresh run may see the finished one that rank 0 is about to put aside
    if run.state() == "finished" and not (is_child_rank() and config["fresh"]):
        if not is_child_rank():
            run.clear_up()  # its process may have been killed before it could
            tidy(run.checkpoints, config["checkpoint"]["keep"])
            summary = run.summary()
            again = "the command that made it runs it again with fresh=true"
            by = f"; {summary['recognised']}" if "recognised" in summary else ""
            say(f"{run.path}: finished before ({headline(summary.get('final', {}))}{by}); {again}")
            _warn_of_other_code(run)
        return 0
    if not is_child_rank():
        check_goes_on(run, config)
    several = world_size(config["trainer"]) > 1
    if several and not received().does_the_work and not launch().starts_the_ranks:
        return _run_in_own_process(run, typed)
    return execute(run, config, typed)


def _warn_of_other_code(run: RunDirectory) -> None:
    before, now = run.summary().get("git") or {}, tasks.git_state()
    if before.get("commit") and now.get("commit") and before["commit"] != now["commit"]:
        say(
            f"note: that run was made by commit {before['commit'][:9]}; the checkout is at {now['commit'][:9]}"
        )


def _run_in_own_process(run: RunDirectory, typed: Sequence[str]) -> int:
    process = Process(run, typed=typed)
    with on_signals(process.signal):
        while not process.ended(60):
            pass
    status = process.outcome()
    if process.unsaid:
        print(f"error: {process.unsaid}", file=sys.stderr, flush=True)
    if run.summary().get("status") == "interrupted" and status > 128:
        raise SystemExit(status)
    return status


def execute(run: RunDirectory, config: Config, typed: Sequence[str] = ()) -> int:
    """Train this run in this process (one of its ranks); its exit status. Whatever happens is recorded."""
    with _Stops() as stops:
        return _execute(run, config, typed, stops)


def _execute(run: RunDirectory, config: Config, typed: Sequence[str], stops: _Stops) -> int:
    first, others = not is_child_rank(), []
    if first:
        (resume, said), name = _find_resume(run, config), received().ranks or secrets.token_hex(4)
        try:
            run.claim(
                token=token(), resume=str(resume or ""), ranks=name, **_whereabouts(config), **_meeting()
            )
        except Held as error:
            if not received().does_the_work:
                raise
            say(str(error))
            return HELD
        run.count_from(received().started or time.time())
        pass_on(resume=str(resume or ""), ranks=name)
        try:
            clear_away_earlier(run, name)
            run.update_summary(status="running", reason="")
            if said:
                say(f"note: {said}")
                run.update_summary(recovered=[*run.summary().get("recovered", []), said])
        except OSError:
            run.release()
            raise
    else:
        resume, said = _resume_of_rank_0(run), ""
    if world_size(config["trainer"]) > 1 and launch().by in ("nobody", "nodes"):
        others = start_others([str(MAIN), option("run", run.path), *typed], config["trainer"])
    ranks = Ranks(run, received().ranks, others)
    handlers = _log_to(run, first)
    if said:
        log.info("%s", said)
    status, outcome, reason = 1, "failed", ""

    def conclude(cause: Cause) -> None:
        _report(cause, "")
        if first:
            ended = "interrupted" if cause.killed else "failed"
            run.update_summary(status=ended, reason=cause.reason, ended=time.time())
            run.release()

    ranks.watch(conclude)
    try:
        stops.working = True
        try:
            final = tasks.train(run, config, resume)
        finally:
            stops.working = False
        status, outcome = 0, "finished"
        if first:
            say(f"{headline(final)}  ->  {run.path}")
    except Interrupted as error:
        # the ranks stop together: a child that reports failure would have rank 0 killed while it writes
        status, outcome, reason = (error.exit_status if first else 0), "interrupted", str(error)
        if first:
            say(f"interrupted; the same command, or {command(option('run', run.path))}, goes on from here")
    except Pruned as error:
        status, outcome, reason = 0, "pruned", str(error)
    except (KeyboardInterrupt, SystemExit) as error:
        status, outcome, reason = 130, "interrupted", f"stopped ({type(error).__name__})"
    except Exception as error:
        said = out_of_memory(config) if is_out_of_memory(error) else _in_a_line(error)
        cause = ranks.cause(error, said)
        where = "" if isinstance(error, _SAID) else f" (traceback in {run.path / 'main.log'})"
        _report(cause, where, error)
        status, reason = (2 if isinstance(error, ConfigError) else 1), cause.reason
        if isinstance(error, Diverged | Unwritable) and not first:
            status = 0  # all ranks have it, and the first one says it
        if cause.killed:
            status, outcome = 128 + signal.SIGKILL, "interrupted"
        if received().tracebacks:
            traceback.print_exc()
    finally:
        try:
            if first:
                run.update_summary(status=outcome, reason=reason, ended=time.time())
                if outcome in ("finished", "pruned"):
                    tidy(run.checkpoints, config["checkpoint"]["keep"] if outcome == "finished" else "last")
        except OSError as error:  # without it the next start takes the run as unfinished, as it is
            if not status:
                print(f"error: {error}", file=sys.stderr, flush=True)
            status = status or 1
        finally:
            close_loggers(status)
            for handler in handlers:  # what comes after this run in this process is not of this run
                for name in _LOGGED:
                    logging.getLogger(name).removeHandler(handler)
                with contextlib.suppress(OSError):  # lines that a full disk has not taken
                    handler.close()
        if first:
            run.release()
        if outcome == "failed" or status == 128 + signal.SIGKILL:
            ranks.failed()
        else:
            ranks.leave()
        if first and status == 128 + signal.SIGUSR1:
            _requeue()
    return status


def out_of_memory(config: Config) -> str:
    """What was too much, and the smaller batches that make the same global one."""
    trainer, size = config["trainer"], config["data"]["module"]["batch_size"]
    window, world = trainer["accumulate_grad_batches"], world_size(trainer)
    text = (
        f"out of memory: data.module.batch_size={size} trainer.accumulate_grad_batches={window} on "
        f"{world} {'device' if world == 1 else 'devices'}"
    )
    parts = next((n for n in range(2, size + 1) if size % n == 0), None)
    if parts is None:
        return f"{text}; one sample is too much: a smaller network or input, or trainer.precision=bf16-mixed"
    smaller = {"data.module.batch_size": size // parts, "trainer.accumulate_grad_batches": window * parts}
    try:
        checking.step_of({**config, "trainer": {**trainer, "accumulate_grad_batches": window * parts}})
    except ConfigError:  # SAM takes one batch a step
        return f"{text}; data.module.batch_size={size // parts} is smaller, and another training"
    typed = " ".join(f"{name}={value}" for name, value in smaller.items())
    return f"{text}; {typed} makes the same global batch of {size * window * world}"


def _requeue() -> None:
    """Ask SLURM, whose warning stopped this run, to start the same job again."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", job], check=False)


def _report(cause: Cause, where: str, error: BaseException | None = None) -> None:
    """Say why the run does not go on, unless another rank has."""
    details = "".join(traceback.format_exception(error)) if error else ""
    if cause.said:
        log.info("%s", details)  # it only follows from the other's
        return
    log.error("%s\n%s", cause.reason, details)
    print(f"error: {cause.reason}{where}", file=sys.stderr, flush=True)


def _in_a_line(error: Exception) -> str:
    """What an error says, with the way on where the machine was short of something."""
    text = masked(" ".join(str(error).split()))
    if isinstance(error, _SAID):
        return text
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        port = os.environ.get("MASTER_PORT")
        return f"MASTER_PORT={port}: another process listens there; give the launcher another port"
    if lacking := worker_died(text):
        return lacking
    return f"{type(error).__name__}: {text[:400]}"


class _Stops:
    """SIGTERM, SIGUSR1 and SIGHUP stop a run in good order before and after its steps too; those in between save first.

    Attributes:
        working: a signal ends the work; else it finds the run about to end, and changes nothing.
    """

    working = False

    def __enter__(self) -> _Stops:
        numbers = (n for n in stopping_signals() if n != signal.SIGINT)
        self._previous = {n: signal.signal(n, self._stop) for n in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        if self.working:
            self.working = False
            raise Interrupted(number)


def _find_resume(run: RunDirectory, config: Config) -> tuple[Path | None, str]:
    """`find_state`; that there is none is recorded."""
    try:
        return find_state(run, config)
    except ConfigError as error:
        if run.state() != "running":
            run.update_summary(status="failed", reason=str(error))
        raise


def _whereabouts(config: Config) -> dict[str, Any]:
    """Where the run is, beside host and process: the cluster's job, and the GPUs that it was given."""
    on_cuda = config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available()
    facts = {"job": job_here(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "") if on_cuda else ""}
    return {name: value for name, value in facts.items() if value}


def _meeting() -> dict[str, Any]:
    """Where the ranks meet that srun has started: at a port that nothing else has; the others read it in the claim."""
    if launch().by != "srun" or "MASTER_PORT" in os.environ:
        return {}
    address, _ = meeting_point()
    open_meeting(address, launch().world)
    return {"meeting": [os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])]}


def _resume_of_rank_0(run: RunDirectory) -> Path | None:
    """The state that rank 0 decided to start from."""
    path = received().resume
    if path is None:
        claim = _wait_for_claim(run)
        path = claim.get("resume", "")
        pass_on(resume=path, ranks=claim["ranks"])
        if "meeting" in claim:
            go_to_meeting(*claim["meeting"])
    return Path(path) if path else None


def _wait_for_claim(run: RunDirectory) -> dict[str, Any]:
    began, said, rank = time.monotonic(), False, launch().rank
    while (waited := time.monotonic() - began) < WAIT_S:
        try:
            claim = json.loads(run.claim_file.read_text(encoding="utf-8"))
            if claim.get("token") == token():
                return claim
        except (OSError, ValueError):
            pass
        if waited > SAY_AFTER_S and not said:
            said = True
            if run.state() == "running":  # rank 0 has found it so, too
                raise Held(f"{run.path}: this run is in progress ({run.holder()})")
            say(f"rank {rank}: waiting for rank 0 to start {run.path} (at most {WAIT_S:.0f} s)")
        time.sleep(0.2)
    named = {"torchrun": "RANK", "another launcher": "RANK", "srun": "SLURM_PROCID"}.get(
        launch().by, "NODE_RANK"
    )
    raise ConfigError(
        f"{run.path}: rank 0 did not start this run within {WAIT_S:.0f} s; this is rank {rank} by "
        f"{launch().by} ({named}={os.environ.get(named)})", see="docs/robustness.md",
    )  # fmt: skip


_EXPECTED_WARNINGS = (  # of what Crucible does on purpose
    ".*It is recommended to use .*sync_dist=True.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*LeafSpec.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    ".*The `srun` command is available on your system but is not used.*",
    ".*You have overridden `on_(after|before)_batch_transfer`.*",
    ".*Couldn't infer the batch indices.*",
)


_LOGGED = ("crucible", "lightning.pytorch", "lightning.fabric", "py.warnings")


class _Masking(logging.Formatter):
    """Without passwords and keys."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _Fitting(logging.Formatter):
    """In lines that the terminal has room for."""

    def format(self, record: logging.LogRecord) -> str:
        return fitted(super().format(record), columns())


class _RunLog(logging.FileHandler):
    """A log that loses lines where the disk is full, which what trains will say, instead of printing tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _log_to(run: RunDirectory, first: bool) -> list[logging.Handler]:
    """Everything to RUN/main.log; to the console warnings only, once."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.captureWarnings(True)
    handler = _RunLog(run.path / "main.log", encoding="utf-8")
    handler.setFormatter(_Masking("%(asctime)s %(levelname)s %(message)s"))
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
    said = logging.StreamHandler(sys.stdout)
    said.setFormatter(_Fitting("note: %(message)s"))
    said.addFilter(lambda record: first and record.levelno == logging.WARNING)  # errors are said by `_report`
    log.addHandler(said)
    return [handler, said]


# on a recorded run

_OWN = ("run", "task", "ckpt_path", "out", "user_dir", "each")
# what may be typed beside run=RUN: for training what leaves the result as it is
_WHILE_TRAINING = (
    "data.module.data_root_dir", "data.module.stylized_root_dir", "data.module.csv_file", "data.module.train_shards",
    "data.module.val_shards", "data.module.test_shards", "data.module.classes_file", "data.module.num_workers",
    "data.module.prefetch_factor", "data.module.persistent_workers", "data.module.pin_memory",
    "trainer.accelerator", "trainer.strategy",
    "trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.profiler", "trainer.detect_anomaly",
    "checkpoint", "callbacks.progress", "callbacks.plots", "logger", "test_after_training",
)  # fmt: skip
_OF_TESTS = ("data.module.class_map", "data.module.stylized_root_dir")
_WHEN_EVALUATING = ("data.module", "trainer", "metrics", "callbacks", "logger")


def run_recorded(arguments: Sequence[str]) -> int:
    """`run=RUN [task=...] [ckpt_path=...] [option=value ...]`; the exit status."""
    given = _read_arguments(arguments)
    task = given.get("task", "train")
    known = ["train", *tasks.OF_TRAINED]
    if task == "tune":
        raise ConfigError(
            "task=tune: trains from the start what its options say, and no recorded run; type them instead of run=RUN",
            see="docs/use.md",
        )
    if task not in known:
        raise ConfigError(f"task={task}: must be one of {', '.join(known)}{suggest(task, known)}")
    asked = _asked(given, task)
    runs = [RunDirectory(path) for path in _expand(given["run"])]
    if typed := [f"{name}={value}" for name, value in given.items() if _names_a_class(name)]:
        pass_on(typed=list(dict.fromkeys([*received().typed, *typed])))  # its ranks may follow them too
    if given.get("each", "false") != "false":
        return _each(arguments, given, runs, task)
    roots = _roots(given, task)
    of_roots = [{**given, _ROOT: root} for root in roots] or [given]
    configs = [{**_with_overrides(run, of_roots[0], task), **asked} for run in runs]
    trainer = configs[0]["trainer"]
    alone = task not in ("train", "test") or len(runs) > 1
    _take_part(trainer, 1 if alone else None)
    if task == "train":
        if len(runs) > 1:
            raise ConfigError(
                f"run={given['run']} names {len(runs)} runs; only task={' and '.join(tasks.OF_SEVERAL)} take several"
            )
        if "ckpt_path" in given:
            raise ConfigError(
                "ckpt_path starts a new run from a training state; run=RUN resumes from its last.ckpt"
            )
        if "given" in (summary := runs[0].known()):
            raise ConfigError(
                f"run={runs[0].path}: holds weights from elsewhere ({summary['given']}), there is no training to go "
                f"on with; task={', '.join(tasks.OF_TRAINED)} use it, model.init_from={runs[0].path} trains on "
                "from it",
                see="docs/weights.md",
            )
        if not is_child_rank() and runs[0].state() == "running":
            error = f"{runs[0].path}: this run is in progress ({runs[0].holder()})"
            if not received().does_the_work:
                raise Held(error)
            say(error)
            return HELD
        if not is_child_rank() and os.access(runs[0].path, os.W_OK):
            with runs[0].locked():
                complete(runs[0], runs[0].config(), overrides=None)
        beside = [a for a in arguments if a.lstrip("+").partition("=")[0] not in ("run", "user_dir")]
        return start(runs[0], configs[0], beside)
    several = not alone and world_size(trainer) > 1
    with quiet_lightning(), _beside_the_others(arguments, trainer, several):
        out = Path(given["out"]).expanduser() if "out" in given else None
        if roots:
            each = {
                root: partial(_to_evaluate, runs, one, task, asked)
                for root, one in zip(roots, of_roots, strict=True)
            }
            return tasks.test_on(each, out)
        return tasks.OF_TRAINED[task](_with_checkpoints(runs, configs, given), out)


@contextlib.contextmanager
def _beside_the_others(arguments: Sequence[str], trainer: Mapping[str, Any], several: bool) -> Iterator[None]:
    """The other ranks of this command are there inside, where nothing else has started them, and end with it.

    Args:
        arguments: of the command.
        trainer: the options of its trainer.
        several: whether it has several ranks.
    """
    starts = several and launch().by in ("nobody", "nodes")
    others = start_others([str(MAIN), *arguments], trainer) if starts else []
    ended = threading.Event()
    end_with_parent(ended, stop=False)
    end_with_children(others, ended)
    try:
        yield
        end_others(others, SAVE_S)
    except Exception as error:
        # rank 0 may have met the same, or this only follows from another's end: what watches it ends this process
        if is_child_rank() or (others and follows(error)):
            ended.wait(FOLLOW_S)
        raise
    finally:
        ended.set()
        end_others(others, 0)


def _read_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """`{option: value}` of what is typed for a recorded run."""
    given: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.lstrip("+").partition("=")
        if name in _OWN:  # texts: a path may have any characters
            given[name] = value if name == "run" else unquoted(value)
        else:
            given.update([parse(argument)])
    return given


def _each(arguments: Sequence[str], given: Mapping[str, Any], runs: Sequence[RunDirectory], task: str) -> int:
    """`each=true`: what the command asks for, of one run after the other, instead of all as one; the worst status.

    What one run cannot do is said in a line, and the others go on. A run without weights yet is passed over.
    """
    if given["each"] != "true":
        raise ConfigError(f"each={given['each']}: must be true or false", see="docs/data.md")
    if task not in tasks.OF_TRAINED:
        raise ConfigError(f"each=true: is for task={', '.join(tasks.OF_TRAINED)}", see="docs/data.md")
    if "out" in given and len(runs) > 1:
        raise ConfigError(
            f"out={given['out']}: one file for each of {len(runs)} runs; leave it out", see="docs/data.md"
        )
    others = [a for a in arguments if a.lstrip("+").partition("=")[0] not in ("run", "each")]
    worst, passed_over, failed = 0, 0, []
    for run in runs:
        if not any(run.checkpoints.glob("*.ckpt")):
            passed_over += 1
            say(f"{run.path}: has no weights yet; passed over")
            continue
        if status := _one_of_each(run, [option("run", str(run.path)), *others], given, task):
            failed.append(run.path.name)
            worst = max(worst, status)
    done = len(runs) - passed_over
    without = f"; {passed_over} without weights" if passed_over else ""
    without += f"; not all went well with {', '.join(failed)}" if failed else ""
    say(f"{done} run{'s, one after the other' if done != 1 else ''}{without}")
    return worst


def _one_of_each(run: RunDirectory, arguments: Sequence[str], given: Mapping[str, Any], task: str) -> int:
    """What the command asks for, of one run; the status. What it leaves in this process is not the next run's."""
    told = received()
    try:
        roots = _roots(given, task)
        first = {**given, _ROOT: roots[0]} if roots else given
        several = task == "test" and world_size(_with_overrides(run, first, task)["trainer"]) > 1
        if several and not launch().starts_the_ranks:  # a process that starts ranks stays one of that run's
            return run_command(arguments)
        return run_recorded(arguments)
    except Exception as error:
        # the other ranks of a launcher have not met it, and wait for this one
        if launch().starts_the_ranks and launch().world > 1 and not isinstance(error, ConfigError):
            raise
        if received().tracebacks:
            traceback.print_exc()
        print(f"{run.path}:", file=sys.stderr)
        return explain(error)
    finally:
        pass_on(**vars(told))


def _expand(text: str) -> list[str]:
    """The runs that `run=` names: a folder of whatever name, or several by commas, as a list, or by globs."""
    if _is_run(unquoted(text)):
        return [str(Path(unquoted(text)).expanduser())]
    listed = text.startswith("[") and text.endswith("]")
    try:
        value = parse(option("run", text) if not listed and "," not in text else f"run={text}").value
    except ConfigError:  # no text of Hydra's grammar, but a path may be
        value = text.split(",")
    parts = [unquoted(str(part).strip()) for part in (value if isinstance(value, list) else [value])]
    found: list[str] = []
    for part in parts:
        path = Path(part).expanduser()
        matches = [str(path)] if _is_run(part) else [str(p) for p in folders_named(path) if _is_run(str(p))]
        if not matches and path.is_symlink() and not path.exists():
            raise ConfigError(f"run={part}: {missing(path)}", see="docs/training.md")
        found += matches or ([] if _has_magic(part) else [str(path)])
    if not found:
        raise ConfigError(
            f"run={text}: no run there; give a folder with a config.yaml", see="docs/training.md"
        )
    return list(dict.fromkeys(found))


def _is_run(text: str) -> bool:
    try:
        return (Path(text).expanduser() / "config.yaml").is_file()
    except (OSError, ValueError):  # too long a name, or NUL in it
        return False


def _has_magic(text: str) -> bool:
    return any(character in text for character in "*?[")


def _with_overrides(run: RunDirectory, given: Mapping[str, Any], task: str) -> Config:
    """The recorded configuration with what was typed; training takes only what leaves the result as it is."""
    recorded = run.config()
    judge(_but_for(recorded, given), f"run={run.path}")
    config = completed(recorded)
    for name, value in given.items():
        if name in _OWN or (_names_a_class(name) and configuration.select(config, name) == value):
            continue
        known = configuration.select(config, name.rpartition(".")[0]) if "." in name else config
        leaf = name.rpartition(".")[2]
        if name in _OF_TESTS and isinstance(known, dict):
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
            raise ConfigError(f"{name}={as_typed(value)}: {changeable}", see="docs/training.md")
        value = _resolved(config, value)
        both = isinstance(value, Mapping) and isinstance(known[leaf], Mapping)
        known[leaf] = {**known[leaf], **value} if both else value
        if name == "metrics":
            config["model"]["metrics"] = value
    if not is_child_rank():
        _check_recorded(run, config)
    if len(given) > 1 and not is_child_rank():
        checking.check(config, [], typed=given)
        checking.resolve_monitor(config)
    return config


def _check_recorded(run: RunDirectory, config: Config) -> None:
    """Options of an earlier version that are no more are said before anything is built."""
    try:
        checking.check_known(config)
    except ConfigError as error:
        commit = (run.known().get("git") or {}).get("commit")
        way_on = f"; git checkout {commit[:9]} goes on with it" if commit else ""
        raise ConfigError(f"run={run.path}: {error}{way_on}", see=error.see) from error


def _names_a_class(option: str) -> bool:
    return option.endswith("._target_") or option.startswith("model.stages.")


def _but_for(config: Config, given: Mapping[str, Any]) -> Config:
    """What is followed of a recorded configuration: all but the callbacks and loggers that were typed to be null."""
    dropped = {name for name, value in given.items() if value is None or value is False}
    groups = {
        group: {n: v for n, v in nodes.items() if f"{group}.{n}" not in dropped}
        for group in ("callbacks", "logger")
        if isinstance(nodes := config.get(group), dict)
    }
    return {**config, **groups}


def _resolved(config: Config, value: Any) -> Any:
    """A typed value; what it takes from other options by ${...} is the recorded configuration's."""
    if "${" not in str(value):
        return value
    found = OmegaConf.create({**config, "typed": value})["typed"]
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def _to_evaluate(
    runs: Sequence[RunDirectory], given: Mapping[str, Any], task: str, asked: Mapping[str, Any]
) -> tasks.Runs:
    """The runs with what was typed for them, and their weights."""
    return _with_checkpoints(runs, [{**_with_overrides(run, given, task), **asked} for run in runs], given)


def _with_checkpoints(
    runs: Sequence[RunDirectory], configs: Sequence[Config], given: Mapping[str, Any]
) -> tasks.Runs:
    for run in runs:
        run.summary()  # one that is damaged is said before anything is loaded
    chosen = [
        run.pick_checkpoint(given.get("ckpt_path", tasks.WEIGHTS.get(given.get("task", "")))) for run in runs
    ]
    for config in configs:
        config["callbacks"] = {k: v for k, v in config["callbacks"].items() if v}
    return list(zip(runs, configs, chosen, strict=True))


_ROOT = "data.module.data_root_dir"


def _roots(given: Mapping[str, Any], task: str) -> list[str]:
    """The folders that one command is to test on; empty where it names none or one."""
    roots = given.get(_ROOT)
    if not isinstance(roots, list):
        return []
    if task != "test" or not roots or not all(isinstance(root, str) for root in roots):
        raise ConfigError(f"{_ROOT}={as_typed(roots)}: several folders are for task=test", see="docs/use.md")
    return list(dict.fromkeys(roots))


# what may be typed beside run=RUN that is no option of a run, by the tasks that take it
_ASKED = {
    **dict.fromkeys(EVALUATION_OPTIONS, checking.READS), **dict.fromkeys(EXPORT_OPTIONS, ("export",)),
}  # fmt: skip


def _asked(given: dict[str, Any], task: str) -> dict[str, Any]:
    """The options of tests, predictions and exports, taken from `given`."""
    asked: dict[str, Any] = {}
    for name, of_tasks in _ASKED.items():
        for typed in [n for n in given if n == name or n.startswith(f"{name}.")]:
            value = given.pop(typed)
            if task not in of_tasks:
                raise ConfigError(
                    f"{typed}={as_typed(value)}: is for task={', '.join(of_tasks)}", see="docs/use.md"
                )
            if typed == name:
                asked[name] = value
            else:
                asked.setdefault(name, {})[typed.removeprefix(f"{name}.")] = value
    for name, value in asked.items():
        if name == "export":
            checking.check_export(value)
        else:
            check_value(name, value, checking.ROOT_TYPES[name])
    return {**asked, "tta": list(views_asked(asked["tta"]))} if "tta" in asked else asked
