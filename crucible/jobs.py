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
from omegaconf import DictConfig, OmegaConf

from crucible import config as configuration
from crucible.command_line import describe, wants_tracebacks
from crucible.config import Config, is_child_rank
from crucible.options import ConfigError, suggest
from crucible.run import RunDirectory, write_atomically

MAIN = Path(__file__).resolve().parent.parent / "main.py"
IN_PROCESS = "CRUCIBLE_IN_PROCESS"  # set for the process that is to do the work itself
RESUME = "CRUCIBLE_RESUME"  # the training state that all ranks of a run start from
WAIT_FOR_RANK_0_S = 600.0
log = logging.getLogger("crucible")

# what the jobs composed in this process came to
_failures: list[str] = []
_raised: list[Exception] = []
_statuses: list[int] = []


# from a composed configuration to a run


def run_composed(composed: DictConfig) -> float | None:
    """Record and run one composed job; the monitored metric (for a sweeper), or None."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    multirun = hydra.mode == RunMode.MULTIRUN
    where = Path(hydra.sweep.dir) if multirun else None
    HydraConfig.instance().cfg = None  # from here on this is `main.py run=RUN`, for Lightning's launcher too
    try:
        run, config, settled = prepare(composed, overrides)
        status = start(run, config, settled, own_process=multirun)
    except Exception as error:
        if not multirun:
            _raised.append(error)
            return None
        message, _ = describe(error)
        _end_of_job(where, overrides, None, "failed", message or f"{type(error).__name__}: {error}")
        return float("nan")
    summary = run.summary()
    if multirun:
        _end_of_job(where, overrides, run, summary.get("status", "failed"), summary.get("reason", ""))
    else:
        _statuses.append(status)
    final = summary.get("final", {})
    monitor = config["checkpoint"]["monitor"] or (
        "val/acc" if config["data"]["task"] == "classification" else "val/loss"
    )
    return float(final.get(monitor, "nan"))


def exit_status() -> int:
    """After all jobs: 0, the failed single run's status, or 1 with the list of a sweep's failures."""
    failures, raised, statuses = list(_failures), list(_raised), list(_statuses)
    for outcome in (_failures, _raised, _statuses):
        outcome.clear()
    if raised:
        raise raised[0]
    if failures:
        print(f"\n{len(failures)} of the sweep's jobs did not finish:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
        return 1
    return max(statuses, default=0)


def _end_of_job(
    where: Path | None, overrides: Sequence[str], run: RunDirectory | None, status: str, reason: str
) -> None:
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
        line = {
            "overrides": list(overrides),
            "run": str(run.path) if run else None,
            "status": status,
            "reason": reason,
        }
        with (where / "jobs.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    if status != "finished":
        text = f"{' '.join(overrides) or '(defaults)'}: {reason or status}"
        _failures.append(text)
        print(f"error: {text}", file=sys.stderr)


def prepare(composed: DictConfig, overrides: list[str]) -> tuple[RunDirectory, Config, list[str]]:
    """Check and resolve a composed configuration, and record it in its run directory.

    Raises:
        ConfigError: for whatever cannot run; nothing has been written then.
    """
    config = configuration.to_plain(composed)
    configuration.check(config, overrides)
    if config["task"] != "train":
        raise ConfigError(
            f"task={config['task']} works on a recorded run: python main.py run=RUN task={config['task']}",
            "README.md",
        )
    _check_torchrun(config)
    from crucible.build import build_data, build_model, file_fingerprint

    data = build_data(config)
    data.check()
    settled = configuration.resolve(config, data)
    configuration.check(config, overrides)
    contents: dict[str, str | None] = {"data": data.fingerprint()}
    for option, room, key in (
        ("model.init_from", config["model"], "init_from"),
        ("ckpt_path", config, "ckpt_path"),
    ):
        if room[key] is not None:
            contents[option] = file_fingerprint(option, room[key])
            room[key] = str(Path(room[key]).expanduser().resolve())
    build_model(config, load=False, compile=False)  # what only the constructor can refuse is refused now
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
    if is_child_rank():
        return run, config, settled
    state = run.state()
    if state == "running":
        raise ConfigError(f"{run.path}: this run is in progress")
    if state != "absent" and config["fresh"]:
        _archive(run)
        state = "absent"
    if state == "absent":
        run.record(config, overrides)
        run.update_summary(
            status="created", reason="", run_id=name, identity=identity, seed=config["seed"],
            arm=configuration.arm_name(config, overrides), techniques=sorted(config.get("techniques") or {}),
            final={}, best={}, data=config["data"]["module"]["name"], started=time.time(),
        )  # fmt: skip
    return run, config, settled


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


def start(run: RunDirectory, config: Config, settled: Sequence[str], own_process: bool) -> int:
    """Run a recorded run to its end, or resume it; a finished one is left as it is. The exit status."""
    if not is_child_rank() and run.state() == "finished":
        final = run.summary().get("final", {})
        _say(f"{run.path}: finished before ({_few(final)}); fresh=true runs it again")
        _warn_of_other_code(run)
        return 0
    if externally_launched():
        return execute(run, config, settled)
    world = configuration.device_count(config["trainer"]) * config["trainer"]["num_nodes"]
    if (own_process or world > 1) and os.environ.get(IN_PROCESS) != "1":
        return _run_in_own_process(run)
    return execute(run, config, settled)


def _few(final: dict[str, float]) -> str:
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


def _run_in_own_process(run: RunDirectory) -> int:
    environment = {**os.environ, IN_PROCESS: "1"}
    logged = (run.path / "main.log").stat().st_size if (run.path / "main.log").is_file() else 0
    process = subprocess.Popen(
        [sys.executable, str(MAIN), f"run={run.path}"], env=environment, start_new_session=True
    )

    def forward(number: int, frame: Any) -> None:
        if process.poll() is None:
            os.killpg(process.pid, number)

    previous = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end_group(process.pid)
    outcome = run.summary().get("status")
    if outcome not in ("finished", "interrupted"):
        reason = f"its process ended with status {status}; {run.path / 'main.log'} may say why"
        reason = (
            _first_error(run, logged)
            or (run.summary().get("reason") if outcome == "failed" else "")
            or reason
        )
        run.update_summary(status="failed", reason=reason, ended=time.time())
        run.release()
    if run.summary().get("status") == "interrupted" and status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise SystemExit(status)
    return status if status >= 0 else 128 - status


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


def execute(run: RunDirectory, config: Config, settled: Sequence[str] = ()) -> int:
    """Train this run in this process (one of its ranks); its exit status. Whatever happens is recorded."""
    from callbacks.recorder import Diverged, Interrupted
    from crucible import tasks
    from crucible.loggers import close_loggers

    first = not is_child_rank()
    if first:
        resume = _find_resume(run, config)
        run.claim(token=_launch_token(), resume=str(resume or ""))
        os.environ[RESUME] = str(resume or "")
        run.update_summary(status="running", reason="")
    else:
        resume = _resume_of_rank_0(run)
    sys.argv = [str(MAIN), f"run={run.path}"]  # what Lightning starts for the other ranks
    _log_to(run, first)
    status, outcome, reason = 1, "failed", ""
    try:
        final = tasks.train(run, config, resume, settled)
        status, outcome = 0, "finished"
        if first:
            _say(f"{_few(final)}  ->  {run.path}")
    except Interrupted as error:
        # the ranks stop together: a child that reports failure would have rank 0 killed while it writes
        status, outcome, reason = (error.exit_status if first else 0), "interrupted", str(error)
        if first:
            _say(f"interrupted; the same command, or python main.py run={run.path}, goes on from here")
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
        close_loggers(status)
        if first:
            run.update_summary(status=outcome, reason=reason, ended=time.time())
            run.release()
    return status


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


def _log_to(run: RunDirectory, first: bool) -> None:
    """Everything to RUN/main.log; to the console warnings only, once."""
    warnings.filterwarnings("ignore", message=".*It is recommended to use .*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings(
        "ignore", message=".*The number of training batches .* is smaller than the logging interval.*"
    )
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*You have overridden `on_after_batch_transfer`.*")
    warnings.filterwarnings("ignore", message=".*You have overridden `on_after_batch_transfer`.*")
    logging.captureWarnings(True)
    handler = logging.FileHandler(run.path / "main.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO if first else logging.ERROR)
    for name in ("crucible", "lightning", "lightning.pytorch", "lightning.fabric", "py.warnings"):
        logger = logging.getLogger(name)
        for console in logger.handlers:
            console.setLevel(logging.WARNING)
        if name in ("crucible", "lightning.pytorch", "lightning.fabric", "py.warnings"):
            logger.disabled = False  # Hydra's "disabled" logging switches off the loggers it finds
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)


# on a recorded run

_OWN = ("run", "task", "ckpt_path", "out", "user_dir")


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
            raise ConfigError(f"{runs[0].path}: this run is in progress")
        return start(runs[0], configs[0], [], own_process=False)
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
        semantic = configuration.is_semantic(name)
        if task == "train" and semantic:
            raise ConfigError(
                f"{name}={value}: run=RUN resumes what was recorded; to change it, start a new run "
                f"(with ckpt_path={run.checkpoints / 'last.ckpt'} to start from this one's state)",
                see="README.md",
            )
        OmegaConf.update(node, name, yaml.safe_load(value))
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    if len(given) > 1 and not is_child_rank():
        configuration.check(plain, [])  # type: ignore[arg-type]
    return plain  # type: ignore[return-value]


def _evaluate(task: str, runs: list[RunDirectory], configs: list[Config], given: dict[str, str]) -> int:
    from crucible import tasks

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*")
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
