#!/usr/bin/env bash
# The runs of docs/findings/plan.md: `bash docs/findings/run.sh STUDY [OPTION=VALUE ...]`, in the checkout, with CIFAR-10 as
# image folders in data/cifar10. Started again, it goes on; dry_run=true shows what there is to do. `pages`: the reports and
# docs/findings.md anew.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 WANDB_MODE=disabled
study=$1
shift
# a record that is read elsewhere names no folder of this machine
trap 'find docs/findings/runs -name config.yaml -exec sed -i "s#: $PWD/#: #" {} +' EXIT
common=(-m n_jobs=2 "exp_dir=docs/findings/runs/$study" checkpoint.keep=none callbacks.plots=null logger.wandb=null
    trainer.enable_progress_bar=false data.module.num_workers=0)
cifar=(data=cifar10 recipe=cifar_laptop)
decided=(sweep=ablation until=decided 'looks=[5,8,12]' margin_points=0.3)
wide=(model=laptop model.lr=0.1)
without_norm=(model=laptop model.norm=none model.lr=0.03)
residual=(model=wide_resnet model.depth=10 model.widen_factor=2 model.lr=0.2)
case $study in
pilot)
    python main.py "${common[@]}" "${cifar[@]}" seed=1000 model=laptop model.lr=0.01,0.03,0.1,0.2 "$@"
    python main.py "${common[@]}" "${cifar[@]}" seed=1000 model=laptop model.norm=none model.lr=0.003,0.01,0.03,0.1 "$@"
    python main.py "${common[@]}" "${cifar[@]}" seed=1000 "${residual[@]:0:3}" model.lr=0.03,0.1,0.2,0.4 "$@"
    ;;
losses)
    python main.py "${common[@]}" "${decided[@]}" "${cifar[@]}" "${wide[@]}" equal_time=true \
        technique=baseline,powergrad,label_smoothing,mixup,cutmix,sam "$@"
    ;;
without_norm)
    python main.py "${common[@]}" "${decided[@]}" "${cifar[@]}" "${without_norm[@]}" \
        technique=baseline,powergrad,label_smoothing "$@"
    ;;
digits)
    python main.py "${common[@]}" "${decided[@]}" technique=baseline,powergrad,label_smoothing,mixup,online_norm,sam "$@"
    ;;
residual)
    python main.py "${common[@]}" "${decided[@]}" "${cifar[@]}" "${residual[@]}" \
        technique=baseline,powergrad,zero_init_residual,undecay_norm,gradient_centralization,stochastic_depth "$@"
    ;;
norms)
    python main.py "${common[@]}" "${decided[@]}" "${cifar[@]}" "${wide[@]}" user_dir=docs/findings baseline=online_norm \
        technique=baseline,online_norm,group_norm_16,layer_norm,instance_norm "$@"
    ;;
residual_losses)
    python main.py "${common[@]}" "${decided[@]}" "${cifar[@]}" "${residual[@]}" \
        technique=baseline,label_smoothing,mixup,cutmix,sam,online_norm "$@"
    ;;
pages)
    for plan in docs/findings/runs/*/sweeps/plan-*.json; do
        name=$(basename "$(dirname "$(dirname "$plan")")")
        baseline=baseline
        [ "$name" = norms ] && baseline=online_norm
        python report.py "runs=docs/findings/runs/$name" "out=docs/findings/$name" baseline=$baseline > /dev/null
    done
    studies=()
    for name in losses without_norm digits residual residual_losses; do
        if [ -d "docs/findings/runs/$name" ]; then studies+=("docs/findings/runs/$name"); fi
    done
    python report.py "runs=[$(IFS=,; echo "${studies[*]}")]" out=docs/findings/settings > /dev/null
    python -m docs.generate
    ;;
*)
    echo "no study $study; there are pilot, losses, without_norm, digits, residual, norms, residual_losses, pages" >&2
    exit 2
    ;;
esac
