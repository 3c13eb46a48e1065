"""The words of other projects' command lines, and what they are here: for the one line that says what is wrong.

The works whose results the recipes reproduce are run by these commands; who comes from them types their words first.
"""

from __future__ import annotations

import re

# flags of github.com/bishshoy/power-grad-transform (a fork of timm), Cerebras/online-normalization and
# PistonY/ModelZoo.pytorch; {} is the value typed behind one
_FLAGS = {
    # a state of training
    "--validate -v -e --evaluate": "python main.py run=RUN task=test",
    "--resume --resume-param": "run=RUN goes on with a run; ckpt_path={} starts this one from a training state, "
    "model.init_from={} from weights of any kind",
    "--initial-checkpoint": "model.init_from={}",
    "--pretrained": "model.pretrained=true",
    "--output --model-dir --save-dir": "exp_dir={}",
    # what is trained on what
    "--model --arch -a": "model=FAMILY model.depth=N or model.type=NAME (docs/models.md), or model=timm model.type={}",
    "-d --depth": "model.depth={}",
    "--data_dir --data-path": "data.module.data_root_dir={}",
    "--num-classes": "data.num_classes={}",
    "-b --batch-size": "data.module.batch_size={} (of one device)",
    "-j --workers --num-data-workers": "data.module.num_workers={}",
    "--dali --dali-gpu --use-lmdb": "nothing: data=imagenet reads folders of pictures, and task=pack makes a copy "
    "that is read faster (docs/data.md)",
    "--img-size --input-size": "data.input_size={}",
    "--crop-pct --crop-ratio": "data.module.test_transforms.crop_pct={}",
    "--interpolation": "data.module.test_transforms.interpolation={}",
    "--train-interpolation": "data.module.train_transforms.interpolation={}",
    "--scale": "data.module.train_transforms.min_area=0.08",
    "--ratio": "data.module.train_transforms.ratio=[0.75,1.333]",
    "--hflip": "data.module.train_transforms.flip={}",
    "--vflip": "data.module.train_transforms.vertical_flip={}",
    "--color-jitter": "model.color_jitter={}",
    "--aa --transform": "data.module.train_transforms._target_=augmentation.policies.imagenet.AutoAugmentTransform or "
    "RandAugmentTransform",
    "--reprob": "model.random_erasing={}",
    # how long, how fast
    "--epochs": "trainer.max_epochs={}",
    "--opt": "model.optimizer={}",
    "--lr --learning-rate": "model.lr={}",
    "--momentum": "model.momentum={}",
    "--weight-decay --wd": "model.weight_decay={}",
    "--no-wd": "model.undecay_norm=true",
    "--sched": "model.scheduler=CosineAnneal or Step or MultiStep",
    "--warmup-epochs": "model.warmstart={}",
    "--warmup-lr": "model.warmstart_from, as a fraction of model.lr",
    "--cooldown-epochs": "model.cooldown={}",
    "--min-lr": "model.lr_min, as a fraction of model.lr",
    "--decay-epochs": "model.scheduler=Step model.lr_step_size={}",
    "--decay-rate --lr-multiplier": "model.lr_multiplier={}",
    "--lr-milestones": "model.scheduler=MultiStep model.lr_milestones=[{}]",
    "--amp --apex-amp --native-amp --dtype": "trainer.precision=16-mixed or bf16-mixed; on a GPU it is by itself",
    "--clip-grad": "trainer.gradient_clip_val={}",
    "--world-size --devices --gpus": "trainer.devices=N trainer.num_nodes=N",
    # techniques
    "--modify-softmax": "model.powergrad_alpha={}",
    "--logit-stats": "technique=logit_stats",
    "--smoothing": "model.label_smoothing={}",
    "--label-smoothing": "model.label_smoothing=0.1",
    "--norm-mode --norm-layer": "model.norm={}",
    "--afwd --decay-factor-forward": "model.norm_kwargs.alpha_fwd={}",
    "--abkw --decay-factor-backward": "model.norm_kwargs.alpha_bkw={}",
    "--ecm": "model.norm_kwargs.ecm={}",
    "--gn-num-groups": "model.norm_kwargs.num_groups={}",
    "--sync-bn": "trainer.sync_batchnorm=true",
    "--activation": "model.activation={}",
    "--dropout --drop": "model.resnet_dropout={}",
    "--drop-path --drop-connect": "model.stochastic_depth={}",
    "--last-gamma": "model.zero_init_residual=true",
    "--mixup": "technique=mixup",
    "--mixup-alpha": "model.mixup_alpha={}",
    "--cutmix": "technique=cutmix",
    "--lookahead": "model.lookahead=true",
    "--sgd-gc": "model.gradient_centralization=conv",
    "--model-ema": "technique=ema",
    "--model-ema-decay": "model.ema_decay={}",
    # the rest
    "--seed": "seed={}",
    "--model-info --print-model": "python main.py task=summary",
    "--log-wandb": "nothing: W&B is on where it has a key (logger.wandb.mode)",
    "--print-freq --log-interval": "callbacks.progress.refresh_rate={}",
}
_BY_FLAG = {flag: text for flags, text in _FLAGS.items() for flag in flags.split()}

# options of github.com/MIC-DKFZ/image_classification: a whole argument, and what it is here
_OPTIONS = (
    (r"trainer\.logger\.(\w+)=(.*)", r"logger.wandb.\1=\2"),
    (r"trainer\.callbacks\.(\w+)\..*", r"callbacks.\1.OPTION=VALUE"),
    (r"model\.result_plot=(?:disable|False|false)", "callbacks.plots=null"),
    (
        r"model\.result_plot=.*",
        "nothing: the plots of validation and test are made (callbacks.plots=null: not)",
    ),
    (r"model\.metric_computation_mode=.*", "nothing: metrics are those of whole epochs"),
    (r"data\.module\._target_=(.*Transform)", r"data.module.train_transforms._target_=\1"),
    (r"data\.module=num_workers[ =]?(\d+)", r"data.module.num_workers=\1"),
    (r"trainer\.accelerator=(CPU|GPU)", lambda m: f"trainer.accelerator={m[1].lower()}"),
    (r"model\.task=([A-Z]\w+)", lambda m: f"data.task={m[1].lower()}"),
    (r"model\.apply_shakedrop=(.*)", r"model.shakedrop=\1"),
    (r"model\.T_max=.*", "trainer.max_epochs: the schedule is as long as the training"),
    (r"model\.epochs=(.*)", r"trainer.max_epochs=\1"),
    (r"model\.name=(.*)", r"arm=\1"),
    (r"seed=(?:False|false)", "seed=0, and reproducible=true for the same bits; every run has a seed"),
)
_METRICS = {
    "pr": "precision and recall", "top5acc": "top5", "accuracy": "acc", "top1": "acc", "top5_acc": "top5",
    "acc_top5": "top5", "f1score": "f1", "auc": "auroc", "roc": "auroc", "rmse": "mse",
}  # fmt: skip
_MODULES = {
    "base_model": "from models.base_model import BaseModel",
    "base_datamodule": "from datasets.base_datamodule import BaseDataModule",
    "augmentation.policies.base_transform": "from augmentation.policies.base import ImagePolicy",
    "regularization": "techniques are options: docs/techniques.md",
    "parsing_utils": "nothing of it is needed",
}


def flag_here(flag: str, value: str | None = None) -> str | None:
    """What a flag of another project is here; `value` is what was typed behind it."""
    text = _BY_FLAG.get(flag)
    return None if text is None else text.replace("{}", value or "VALUE")


def option_here(argument: str) -> str | None:
    """What an argument `option=value` of another project is here."""
    for pattern, text in _OPTIONS:
        if match := re.fullmatch(pattern, argument.lstrip("+")):
            return text(match) if callable(text) else match.expand(text)
    return None


def metric_here(name: str) -> str | None:
    """What a metric's name elsewhere is called here."""
    return _METRICS.get(name.lower())


def module_here(name: str) -> str | None:
    """The line that takes the place of an import of another project's module."""
    return next((line for known, line in _MODULES.items() if name in (known, f".{known}")), None)
