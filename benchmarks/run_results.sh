#!/usr/bin/env bash
# Every number of README.md and docs/results.md:
#
#     TORCH_HOME=/path/to/torch_home bash benchmarks/run_results.sh [part...]
#
# Parts: PARTS at the end, in order, by default, `models`, and those of ON_FOLDERS, which need folders of photographs: PHOTOGRAPHS, CBSD68.
# `models` trains the prior `photos_prior` and the four models on it anew and puts them into ud2m/pretrained. What is finished
# in runs/results and samples/results is not repeated (remove these folders to start anew), and an interrupted training is
# resumed. LPIPS needs AlexNet's weights in $TORCH_HOME/hub/checkpoints, and its use as a loss those of VGG.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=runs/results      # trained models
OUT=samples/results    # scores
SHARP_STEPS="steps=700 validate_every=350"
MORE_LEVELS="num_steps=5 grid_power=2.0 eta=0.0"
BUSY="Times are those of a busy machine."
declare -A SEARCH=([32]=32 [128]=4) # validation images, by size, on which LATINO's best setting is searched
OPERATORS="gaussian_blur super_resolution inpainting"
LATINO_GRID="setting.tau_first:[0.2,0.4],setting.tau_last:[0.01,0.02,0.04],setting.width:[1.0,1.4]" # on photographs
LATINO_WIDER=${LATINO_GRID/0.04/0.04,0.08}  # where its best setting lay at the edge
# of the comparisons of losses and of initialisations: small crops, so that many runs fit into an hour,
SHORT="steps=120 validate_every=120 data.crop_size=32 training.optimizer.warmup=10"
SIXTH="data.test_limit=57"            # their test pieces: every sixth one
TWELFTH="data.test_limit=29"          # of the many runs on initialisations

# train NAME overrides...: a run in runs/results/NAME
train() {
    local folder=$RUNS/$1
    shift
    if [ -d "$folder/export" ]; then
        echo "finished already: $folder"
    elif [ -f "$folder/checkpoints/last.ckpt" ]; then
        "$PYTHON" train.py resume=true run_dir="$folder" </dev/null
    else
        "$PYTHON" train.py run_dir="$folder" "$@" </dev/null
    fi
}

# sample NAME overrides...: scores on all test images in samples/results/NAME
sample() {
    local folder=$OUT/$1
    shift
    [ -f "$folder/metrics.json" ] || "$PYTHON" sample.py output="$folder" "$@" </dev/null
}

# evaluate NAME overrides...: results/NAME, whose finished cells are not computed again
evaluate() {
    local name=$1
    shift
    "$PYTHON" -m ud2m evaluate name="$name" "$@" </dev/null
}

collect() {
    "$PYTHON" benchmarks/results.py collect "$@"
}

# collect_on VARIABLE NAME folders... [--note TEXT]: the result NAME of a part that needs the folder of photographs VARIABLE
collect_on() {
    local variable=$1
    shift
    collect "$@" --command "$variable=FOLDER bash benchmarks/run_results.sh ${FUNCNAME[1]}"
}

# pieces FOLDER SIZE LIMIT words...: the data set of LIMIT square test pieces of FOLDER's images
pieces() {
    local root=$1 size=$2 limit=$3
    shift 3
    echo "folder root=$root crop_size=$size tile_size=$size test_limit=$limit${*:+ $*}"
}

# latino FIRST LAST WIDTH ORIENTATIONS LABEL, ddrm ETA POWER ORIENTATIONS LABEL: these methods at one setting, as a list holds them
latino() {
    echo "\"latino target.setting.tau_first=$1 target.setting.tau_last=$2 target.setting.width=$3 target.symmetries=$4 tune=null label=$5\""
}

ddrm() {
    echo "\"ddrm target.eta=$1 target.power=$2 target.symmetries=$3 tune=null label=$4\""
}

ship() {
    "$PYTHON" data_prep/ship_model.py --replace "$@"
}

models() {
    train photos_prior experiment=photos_prior
    ship $RUNS/photos_prior/export photos_prior
    for operator in $OPERATORS general; do
        train "photos_$operator" experiment="photos_$operator"
        ship "$RUNS/photos_$operator/export" "photos_$operator"
    done
}

prior() {
    "$PYTHON" benchmarks/prior_denoising.py
}

operators() {
    for operator in $OPERATORS; do
        train "demo_$operator" experiment=demo physics="$operator"
        for size in 32 128; do
            sample "${operator}_$size" model="photos_$operator" data.tile_size=$size data.val_limit=${SEARCH[$size]} compare=true
            sample "steps_${operator}_$size" model="photos_$operator" data.tile_size=$size step_scale=1.4
            sample "demo_${operator}_$size" model="$RUNS/demo_$operator/export" data.tile_size=$size
            collect "${operator}_$size" "$OUT/${operator}_$size" \
                "UD2M, step_scale 1.4=$OUT/steps_${operator}_$size" \
                "UD2M, demo's budget=$OUT/demo_${operator}_$size" \
                --command "python sample.py model=photos_$operator data.tile_size=$size data.val_limit=${SEARCH[$size]} compare=true"
        done
    done
    noisier
}

# Deblurring at sigma_y = 0.05: the shipped model, which was trained at 0.01, the one that was trained on many operators and
# noise levels, and one trained at 0.05 with the demo's budget.
noisier() {
    train demo_noise05 experiment=demo physics.sigma_y=0.05
    for size in 32 128; do
        sample noise05_$size model=photos_gaussian_blur sigma_y=0.05 data.tile_size=$size data.val_limit=${SEARCH[$size]} compare=true
        sample general_noise05_$size model=photos_general physics=gaussian_blur sigma_y=0.05 data.tile_size=$size
        sample demo_noise05_$size model=$RUNS/demo_noise05/export data.tile_size=$size
        collect gaussian_blur_noise05_$size $OUT/noise05_$size \
            "UD2M, photos_general=$OUT/general_noise05_$size" \
            "UD2M, trained at 0.05, demo's budget=$OUT/demo_noise05_$size" \
            --command "python sample.py model=photos_gaussian_blur sigma_y=0.05 data.tile_size=$size data.val_limit=${SEARCH[$size]} compare=true"
    done
}

# Short runs that differ in the loss alone. Columns: name | label | overrides.
losses() {
    local sources=() name label overrides
    while IFS='|' read -r name label overrides; do
        train "losses/$name" experiment=demo $SHORT loss.mean_l2=0 $overrides
        sample "losses/$name" model="$RUNS/losses/$name/export" $SIXTH
        sources+=("$label=$OUT/losses/$name")
    done <<'VARIANTS'
default|energy|
spread1|energy, spread 1|loss.terms.energy.term.spread=1
rank0|energy, rank 0 (psi alone)|lora.rank=0
adversarial|energy + 0.01 adversarial|loss.adversarial=0.01
more_adversarial|energy + 0.3 adversarial|loss.adversarial=0.3
fast_adversarial|energy + 0.3 adversarial, D 20 x faster|loss.adversarial=0.3 training.optimizer.lr_discriminator=4e-3
prior|energy + 0.05 prior features|loss.perceptual=0.05
lpips|energy + 0.05 LPIPS|loss.perceptual=0.05 loss/distance=lpips
feature_energy|energy + 0.05 feature energy|loss.feature_energy=0.05
mean_l2|energy + 10 squared error of the mean|loss.mean_l2=10
mean_l2_30|energy + 30 squared error of the mean (the demo's)|loss.mean_l2=30
l2|L2|loss.l2=1 loss.energy=0
l2_lpips|L2 + 0.1 LPIPS|loss.l2=1 loss.energy=0 loss.perceptual=0.1 loss/distance=lpips
l2_lpips_adversarial|L2 + 0.1 LPIPS + 0.01 adversarial|loss.l2=1 loss.energy=0 loss.perceptual=0.1 loss/distance=lpips loss.adversarial=0.01
VARIANTS
    collect losses "${sources[@]}" --command "bash benchmarks/run_results.sh losses"
}

# Both rules for psi and the warm starts, before training (learning rates of almost 0) and after a short one.
initialisation() {
    local photos="experiment=demo loss.mean_l2=0" sources=() images start label overrides budget
    train mnist_prior experiment=mnist_prior
    local mnist="experiment=mnist_super_resolution prior=$RUNS/mnist_prior/export"
    for images in photos mnist; do
        while IFS='|' read -r start label overrides; do
            for budget in untrained trained; do
                name=initialisation/${images}_${start}_$budget
                local steps="$SHORT steps=60 validate_every=60"
                [ $budget = trained ] || steps="steps=1 validate_every=1 training.optimizer.lr=1e-9 training.optimizer.lr_psi=1e-9 training.optimizer.lr_start=1e-9"
                train "$name" ${!images} $overrides $steps
                sample "$name" model="$RUNS/$name/export" data=$images $TWELFTH
                sources+=("$label, $budget=$OUT/$name")
            done
        done <<'STARTS'
paper_pinv|paper's rule, A^dagger y|network=paper
paper_smoothing|paper's rule, smoothing start|network=paper network.warm_start={name:smoothing}
annealed_pinv|annealed rule, A^dagger y|network=paper network.rule={name:annealed}
annealed_smoothing|annealed rule, smoothing start|network=default
annealed_network|annealed rule, trained network|network=learned
STARTS
    done
    collect initialisation "${sources[@]}" --command "bash benchmarks/run_results.sh initialisation"
}

# Both data terms of JPEG, models on operators that they were not trained for, and wrong things told to a model.
general() {
    "$PYTHON" benchmarks/jpeg_likelihood.py
    "$PYTHON" benchmarks/cross_operators.py table
    "$PYTHON" benchmarks/cross_operators.py misspecified
}

# Exactly known posteriors.
exact() {
    local study="--iterations 1000 --observations 16 --samples 64"
    "$PYTHON" benchmarks/exact_posteriors.py table --blocks 1 2 4 8 --steps 1 2 4 8 16 $study --store exact_posteriors
    "$PYTHON" benchmarks/exact_posteriors.py losses $study --store exact_losses
    "$PYTHON" benchmarks/exact_posteriors.py sampling $study --store exact_sampling
}

# Conditional W2 of digits over K and N.
mnist() {
    train mnist_prior experiment=mnist_prior
    for blocks in 1 2 4 8; do
        train mnist_K$blocks experiment=mnist_super_resolution prior=$RUNS/mnist_prior/export network.num_blocks=$blocks \
            loss.terms.energy.term.spread=1.0 steps=500 validate_every=250 trainer.precision=bf16-mixed
    done
    "$PYTHON" benchmarks/mnist_wasserstein.py table
    "$PYTHON" benchmarks/mnist_wasserstein.py picture --blocks 1 8 --steps 1 1
}

# Latent priors with a prompt, on digits; the last export is what ships as ud2m/pretrained/digits.
latent() {
    train digits_vae experiment=digits_vae
    train digits_latent experiment=digits_latent training.vae=$RUNS/digits_vae/export
    train digits experiment=digits_consistency training.start_from=$RUNS/digits_latent/export
    "$PYTHON" benchmarks/latent_digits.py --images 200 --tune 20 --methods "A^dagger y" LATINO LATINO-PRO \
        "LATINO-PRO, simplex" "LATINO-PRO, transition"
    "$PYTHON" benchmarks/latent_digits.py --name latent_rivals --images 200 --tune 20 \
        --teacher "$RUNS/digits_latent/export" --methods LATINO "LATINO, corrected" "LATINO, corrected 8 times" LATINO-PRO \
        "LATINO-PRO, covariance" "LATINO-PRO, scores of 3 pairs, corrected" \
        "LATINO-PRO, scores of 3 pairs, corrected 8 times" "LATINO-PRO, scores of 80 pairs, corrected 8 times" \
        TReg LDPS PSLD P2L
}

# The paper's columns with rivals: bridges, models for the operators that no shipped model is for, and models that go on
# from them with a trained warm start, are trained first.
declare -A UNSHIPPED=(
    [uniform_blur]="training.start_from=photos_gaussian_blur loss.mean_l2=30 steps=900 validate_every=300"
    [jpeg]="steps=500 validate_every=250"
)
rivals_on() {
    local operator=$1 photos="experiment=photos_super_resolution physics=$1" model=photos_$1 methods
    local bridge="target.model=$RUNS/bridge_$operator/export"
    if [ -n "${UNSHIPPED[$operator]:-}" ]; then
        train "photos_$operator" $photos ${UNSHIPPED[$operator]}
        model=$RUNS/photos_$operator/export
    fi
    train "start_$operator" $photos network=learned training.start_from="$model" training.optimizer.lr_start=1e-3 \
        loss.mean_l2=30 steps=200 validate_every=100
    train "bridge_$operator" experiment=photos_bridge physics="$operator"
    methods="latino,ddrm,diffpir,\"i2sb label=I2SB $bridge\""
    methods+=",\"i2sb label=I2SB,_9_steps $bridge target.num_steps=9 tune=null\",\"cddb label=CDDB $bridge\""
    methods+=",\"ud2m label=UD2M target.model=$model\""
    methods+=",\"ud2m label=UD2M,_warm-start_network target.model=$RUNS/start_$operator/export\""
    evaluate "rivals_$operator" operators="[$operator]" num_samples=4 tune_images=4 unsupported=skip \
        metrics='[psnr,ssim,lpips,frechet_alex,r,residual]' methods="[$methods]" datasets='["photos test_limit=260"]' reference=UD2M
    [ "$operator" != jpeg ] || return 0
    evaluate "rivals_dps_$operator" operators="[$operator]" num_samples=1 tune_images=4 tune_samples=1 \
        methods="[latino,pnp_flow,dps,\"ud2m label=UD2M target.model=$model\"]" datasets='["photos test_limit=29"]' \
        metrics='[psnr,ssim,lpips,residual]' reference=UD2M
}

rivals() {
    local folders=() slow=() operator
    for operator in gaussian_blur uniform_blur super_resolution jpeg; do
        rivals_on "$operator"
        folders+=("results/rivals_$operator")
        [ "$operator" = jpeg ] || slow+=("results/rivals_dps_$operator")
    done
    collect rivals "${folders[@]}" --command "bash benchmarks/run_results.sh rivals"
    collect rivals_dps "${slow[@]}" --command "bash benchmarks/run_results.sh rivals"
    evaluate rivals_samples operators='[super_resolution]' num_samples=16 tune_images=4 metrics='[psnr,lpips,r]' \
        methods="[latino,\"ud2m label=UD2M\",\"ud2m label=UD2M,_warm-start_network target.model=$RUNS/start_super_resolution/export\"]" \
        datasets='["photos test_limit=260"]' reference=LATINO
    collect rivals_samples results/rivals_samples --command "bash benchmarks/run_results.sh rivals"
}

# Four evaluations of ours beside nine of the paper's rule.
fewer_on() {
    local operator=$1 methods="" name label
    local paper="network=paper network.warm_start={name:smoothing} training.sampling.grid_power=2.0"
    local loss="loss.mean_l2=0 loss.l2=1 loss.energy=0 loss.perceptual=0.1 loss/distance=lpips loss.adversarial=0.01"
    train "few_paper_$operator" experiment=demo physics="$operator" $paper $loss training.sampling.symmetries=1
    train "few_rule_$operator" experiment=demo physics="$operator" $paper
    train "few_K4_$operator" experiment=demo physics="$operator" network.num_blocks=4 training.sampling.num_steps=1
    train "few_K2_$operator" experiment=demo physics="$operator" network.num_blocks=2 training.sampling.num_steps=2
    train "demo_$operator" experiment=demo physics="$operator"
    while IFS='|' read -r name label; do
        methods+="\"ud2m label=$label target.model=$RUNS/${name}_$operator/export\","
    done <<'MODELS'
few_paper|paper,_K_=_3,_N_=_3
few_rule|rule_of_the_paper,_K_=_3,_N_=_3
demo|ours,_K_=_3,_N_=_3
few_K4|ours,_K_=_4,_N_=_1
few_K2|ours,_K_=_2,_N_=_2
MODELS
    methods+="\"ud2m label=ours,_K_=_3,_N_=_1 target.model=$RUNS/demo_$operator/export target.num_steps=1\","
    methods+='"ud2m label=shipped,_K_=_3,_N_=_1 target.num_steps=1"'
    evaluate "few_steps_$operator" operators="[$operator]" methods="[$methods]" metrics='[psnr,lpips,r,residual]' \
        datasets='["photos test_limit=57"]' reference="'paper, K = 3, N = 3'"
}

fewer() {
    local operator folders=()
    for operator in gaussian_blur super_resolution; do
        fewer_on "$operator"
        folders+=("results/few_steps_$operator")
    done
    collect few_steps "${folders[@]}" --command "bash benchmarks/run_results.sh fewer"
}

# Short runs that differ in one choice, and one model sampled in many ways. Columns: name | label | training | sampling.
ablations() {
    local sources=() name label training sampling
    while IFS='|' read -r name label training sampling; do
        train "ablations/${name%%@*}" experiment=demo $SHORT loss.mean_l2=0 $training
        sample "ablations/$name" model="$RUNS/ablations/${name%%@*}/export" $TWELFTH $sampling
        sources+=("$label=$OUT/ablations/$name")
    done <<'VARIANTS'
default|default||
rank0|rank 0 (psi alone)|lora.rank=0|
rank1|rank 1|lora.rank=1|
rank4|rank 4|lora.rank=4|
rank32|rank 32|lora.rank=32|
power2|grid power 2|training.sampling.grid_power=2.0|
power3|grid power 3|training.sampling.grid_power=3.0|
power8|grid power 8|training.sampling.grid_power=8.0|
visited|levels of training: those that sampling visits|training.levels.spread=0.0|
anywhere|levels of training: anywhere|training.levels.spread=1.0|
ema|averages over 10 steps|training.optimizer.ema_decay=0.9|
level|psi a function of the noise level|network.conditioning=[level]|
l2|L2 loss|loss.l2=1 loss.energy=0|
l2_edm|L2 loss, weights 1 / sigma^2 + 16|loss.l2=1 loss.energy=0 loss.terms.l2.term.weighting=edm|
K1@1|K = 1, N = 1|network.num_blocks=1|num_steps=1
K1@2|K = 1, N = 2|network.num_blocks=1|num_steps=2
K1@4|K = 1, N = 4|network.num_blocks=1|num_steps=4
K1@8|K = 1, N = 8|network.num_blocks=1|num_steps=8
K2@1|K = 2, N = 1|network.num_blocks=2|num_steps=1
K2@2|K = 2, N = 2|network.num_blocks=2|num_steps=2
K2@4|K = 2, N = 4|network.num_blocks=2|num_steps=4
default@1|K = 3, N = 1||num_steps=1
default@2|K = 3, N = 2||num_steps=2
K4@1|K = 4, N = 1|network.num_blocks=4|num_steps=1
K4@2|K = 4, N = 2|network.num_blocks=4|num_steps=2
K4N1|K = 4, N = 1, trained for it|network.num_blocks=4 training.sampling.num_steps=1|
K4N1_visited|K = 4, N = 1, trained at its level alone|network.num_blocks=4 training.sampling.num_steps=1 training.levels.spread=0|
K8@1|K = 8, N = 1|network.num_blocks=8|num_steps=1
VARIANTS
    collect ablations "${sources[@]}" --command "bash benchmarks/run_results.sh ablations"
    local methods="" eta steps
    for eta in 0.0 0.5 1.0 fresh; do
        methods+="\"ud2m label=N_=_3,_eta_=_$eta target.eta=$eta\","
    done
    for steps in 1 2 4 8; do
        methods+="\"ud2m label=N_=_$steps,_eta_=_1.0 target.num_steps=$steps\","
    done
    evaluate sampling operators='[gaussian_blur]' methods="[${methods%,}]" metrics='[psnr,lpips,r,residual]' \
        datasets='["photos test_limit=57"]' reference="'N = 3, eta = 1.0'"
    collect sampling results/sampling --command "bash benchmarks/run_results.sh ablations"
}

# Time ratios, memory and reading: on a machine that does nothing else.
cost() {
    "$PYTHON" benchmarks/results.py cost
    "$PYTHON" benchmarks/results.py compiled
    "$PYTHON" benchmarks/memory.py --store
    "$PYTHON" benchmarks/loading.py --store
    for part in pictures threads shared; do "$PYTHON" benchmarks/cores.py $part; done
}

picture() {
    "$PYTHON" benchmarks/gallery.py
}

# stage NAME SETTINGS START overrides...: the run NAME_SETTINGS, which trains the model START on
stage() {
    local name=$1 settings=$2 start=$3
    shift 3
    train "${name}_$settings" experiment=photographs settings="$settings" training.start_from="$start" \
        training.optimizer.lr=4e-4 data.root="$PHOTOGRAPHS" "$@"
}

# features NAME START overrides...: the model START trained on with the energy score of VGG's features besides
features() {
    local name=$1 start=$2
    shift 2
    stage "$name" features "$start" steps=800 validate_every=800 "$@"
}

# sharp NAME OPTIONS overrides...: the run NAME_features trained on for sharper single samples, shipped as NAME, which
# samples with OPTIONS, as they were chosen on validation pieces: more levels between the first and the last
sharp() {
    local name=$1 options=$2
    shift 2
    stage "$name" sharp "$RUNS/${name}_features/export" $SHARP_STEPS "$@"
    last "${name}_sharp"
    ship "$RUNS/${name}_sharp/export-last" "$name" --prior photographs_prior --options $options
}

# last NAME: the last checkpoint of the run NAME, where the score of pixels would choose another one, as its export-last
last() {
    [ -d "$RUNS/$1/export-last" ] || "$PYTHON" train.py export=last.ckpt run_dir="$RUNS/$1"
}

# Models trained on a folder of photographs with train, val and test, PHOTOGRAPHS.
photographs() {
    local operator
    local -A first=([inpainting]="steps=1200") second=([gaussian_blur]="loss.feature_energy=1 steps=600 validate_every=600")
    local -A options=([inpainting]="num_steps=3" [super_resolution]="$MORE_LEVELS needs_float32=true")
    for operator in $OPERATORS; do
        train "photographs_$operator" experiment=photographs physics="$operator" training.start_from="photos_$operator" \
            data.root="$PHOTOGRAPHS" ${first[$operator]:-}
        features "photographs_$operator" "$RUNS/photographs_$operator/export" physics="$operator" ${second[$operator]:-}
        sharp "photographs_$operator" "${options[$operator]:-$MORE_LEVELS}" physics="$operator"
    done
    evaluate photographs operators="[${OPERATORS// /,}]" prior=photographs_prior tune_by=lpips tune_samples=1 \
        methods="[\"ud2m target.model=photos_{physics} label=UD2M_(photos)\",\"ud2m target.model=$RUNS/photographs_{physics}/export label=UD2M_(photographs),_pixels_alone\",\"ud2m target.model=photographs_{physics} label=UD2M_(photographs)\",\"latino tune={$LATINO_GRID}\"]" \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 128 59 val_limit=24)\"]" \
        metrics='[psnr,psnr_limit,lpips,r,energy,residual]' reference=LATINO
    collect_on PHOTOGRAPHS photographs results/photographs
}

# Models for two operators more, each trained on from the one of the operator that is most like it, with the losses of their last stage.
photographs_more() {
    features photographs_jpeg "$RUNS/photographs_super_resolution_features/export" physics=jpeg loss.feature_energy=1 \
        steps=1400 validate_every=700 training.optimizer.lr=6e-4
    features photographs_uniform_blur "$RUNS/photographs_gaussian_blur_features/export" physics=uniform_blur loss.feature_energy=1
    sharp photographs_jpeg "$MORE_LEVELS" physics=jpeg
    sharp photographs_uniform_blur "num_steps=4 grid_power=3.0 eta=0.0" physics=uniform_blur
    evaluate photographs_more operators='[jpeg,uniform_blur]' prior=photographs_prior num_samples=4 tune_by=lpips tune_samples=1 unsupported=skip \
        methods="[\"ud2m target.model=photographs_{physics} label=UD2M\",\"ud2m target.model=photographs_general label=UD2M,_general_model\",\"latino tune={$LATINO_WIDER}\",\"ddrm tune={eta:[0.5,0.85,1.0],power:[2.0,3.0]}\"]" \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 128 59 val_limit=24)\"]" \
        metrics='[psnr,psnr_limit,lpips,r,energy,residual]' reference=UD2M
    collect_on PHOTOGRAPHS photographs_more results/photographs_more
}

# The general model on operators of its family, beside specialists, and on motion blur, on PHOTOGRAPHS.
mixture() {
    local folders=() operator specialist
    train photographs_general experiment=photographs physics=general network=conditioned steps=2400 validate_every=600 \
        training.start_from=photos_general data.root="$PHOTOGRAPHS"
    features photographs_general "$RUNS/photographs_general/export" physics=general network=conditioned \
        "physics.operator.weights=[2,1,1,1,5,1,1,1]" steps=1000 validate_every=1000
    local wide="physics=general network=conditioned lora.rank=32 lora.alpha=32 training.optimizer.lr_psi=3e-2 loss.terms.feature_energy.term.spread=0.85"
    stage photographs_general sharp "$RUNS/photographs_general_features/export" $wide \
        "physics.operator.weights=[3,1,1,3,6,1,1,1]" steps=3000 validate_every=1500
    last photographs_general_sharp
    stage photographs_general_more sharp "$RUNS/photographs_general_sharp/export-last" $wide \
        "physics.operator.weights=[2,1,1,2,10,1,1,1]" steps=2500 validate_every=1250
    last photographs_general_more_sharp
    ship "$RUNS/photographs_general_more_sharp/export-last" photographs_general --prior photographs_prior --options num_steps=4 grid_power=3.25 eta=1.0
    for operator in $OPERATORS valid strokes motion_blur; do
        case $operator in
            valid) set -- '"gaussian_blur operator.boundary=valid"' gaussian_blur ;;
            strokes | motion_blur) set -- $operator ;;
            *) set -- $operator $operator ;;
        esac
        specialist=${2:+"\"ud2m target.model=photographs_$2 label=specialist\","}
        evaluate "general_$operator" operators="[$1]" prior=photographs_prior num_samples=4 \
            tune_by=lpips tune_samples=1 tune_images=12 reference=LATINO \
            methods="[$specialist\"ud2m target.model=photographs_general label=photographs_general\",\"ud2m target.model=photos_general label=photos_general\",\"latino tune={$LATINO_GRID}\"]" \
            datasets="[\"$(pieces "$PHOTOGRAPHS" 128 30 val_limit=24)\"]" \
            metrics='[psnr,psnr_limit,lpips,r,energy,residual]'
        folders+=("results/general_$operator")
    done
    collect_on PHOTOGRAPHS general "${folders[@]}" --note "$BUSY"
}

# Distortion against perception on PHOTOGRAPHS: single samples and means, step_scale, and rivals at several settings.
tradeoff() {
    local folders=() operator ours all scale setting first last width eta number
    for operator in gaussian_blur super_resolution; do
        ours="ud2m target.model=photographs_$operator"
        all="\"$ours label=UD2M_mean_2\""
        for scale in 0.7 1.4; do all+=",\"$ours target.step_scale=$scale label=UD2M_step_scale_$scale\""; done
        for setting in "0.2 0.01 1.0" "0.4 0.02 1.4" "0.4 0.04 1.4"; do
            read -r first last width <<< "$setting"
            all+=",$(latino "$first" "$last" "$width" 1 "LATINO_${first}_to_${last}_width_$width")"
        done
        for eta in 0.85 0.5; do all+=",$(ddrm $eta 3.0 1 DDRM_eta_$eta)"; done
        for number in 8 4 2; do
            [ "$number" = 2 ] || setting="\"$ours label=UD2M_mean_$number\""
            [ "$number" != 2 ] || setting=$all
            evaluate "tradeoff_${operator}_$number" operators="[$operator]" prior=photographs_prior num_samples="$number" \
                tune=false metrics='[psnr,lpips]' show=0 methods="[$setting]" \
                datasets="[\"$(pieces "$PHOTOGRAPHS" 128 16)\"]"
            folders+=("results/tradeoff_${operator}_$number")
        done
    done
    collect_on PHOTOGRAPHS tradeoff "${folders[@]}" --note "$BUSY"
}

# Coverage, and error against standard deviation, on PHOTOGRAPHS.
calibration() {
    evaluate calibration operators="[${OPERATORS// /,},uniform_blur,jpeg]" prior=photographs_prior num_samples=19 show=2 \
        methods='["ud2m target.model=photographs_{physics} label=UD2M"]' metrics='[psnr_limit,r,coverage,spatial,energy]' \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 128 16)\"]"
    collect_on PHOTOGRAPHS calibration results/calibration --note "$BUSY"
}

# The adversarial term with a discriminator that learns, on PHOTOGRAPHS: a model of the part `photographs` before its last stage, trained on by the energy score, and with the term beside it.
adversarial() {
    local common="experiment=photographs physics=gaussian_blur training.start_from=$RUNS/photographs_gaussian_blur/export discriminator=features
        training.optimizer.lr=2e-4 training.optimizer.lr_discriminator=1e-3 data.root=$PHOTOGRAPHS"
    local felt="loss.relative=true training.optimizer.discriminator_warmup=150" folder=$RUNS/adversarial
    train adversarial_0 $common steps=400 validate_every=200
    train adversarial_0.3 $common $felt steps=400 validate_every=400 loss.adversarial=0.3
    train adversarial_1 $common $felt steps=500 validate_every=500 loss.adversarial=1
    evaluate adversarial operators='[gaussian_blur]' prior=photographs_prior \
        methods="[\"ud2m target.model=$RUNS/photographs_gaussian_blur/export label=shipped\",\"ud2m target.model=${folder}_0/export label=energy\",\"ud2m target.model=${folder}_0.3/export label=energy_and_adversarial_0.3\",\"ud2m target.model=${folder}_1/export label=energy_and_adversarial_1\"]" \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 128 40 val_limit=24)\"]" \
        metrics='[psnr,psnr_limit,lpips,r,energy]' tune=false reference=shipped
    collect_on PHOTOGRAPHS adversarial results/adversarial
}

# The paper's losses on PHOTOGRAPHS: L2 + LPIPS, and the adversarial term at growing weights, each as large beside them as it says.
paper_losses() {
    local weight start=$RUNS/photographs_gaussian_blur/export
    local methods="\"ud2m target.model=$start label=energy_score_alone\",\"ud2m target.model=$RUNS/photographs_gaussian_blur_features/export label=energy_score_of_features_besides\""
    for weight in 0 0.3 1; do
        train "paper_$weight" experiment=photographs physics=gaussian_blur training.start_from="$start" \
            data.root="$PHOTOGRAPHS" discriminator=features loss.relative=true loss.energy=0 loss.l2=1 loss.perceptual=0.5 \
            loss/distance=lpips loss.distance.net=vgg loss.adversarial="$weight" steps=1500 validate_every=500 \
            training.optimizer.lr=2e-4 training.optimizer.lr_discriminator=1e-3 training.optimizer.discriminator_warmup=150
        last "paper_$weight"
        methods+=",\"ud2m target.model=$RUNS/paper_$weight/export-last label=L2_+_LPIPS_+_${weight}_adversarial\""
    done
    evaluate paper_losses operators='[gaussian_blur]' prior=photographs_prior num_samples=13 methods="[$methods]" \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 64 260)\"]" \
        metrics='[psnr,psnr_limit,lpips,r,energy,coverage,frechet_alex]' reference="'energy score alone'"
    collect_on PHOTOGRAPHS paper_losses results/paper_losses
}

# Rivals on the new prior on PHOTOGRAPHS, all tuned by the PSNR of their mean and by LPIPS, random orientations included.
photographs_rivals() {
    local ours="ud2m target.model=photographs_{physics}"
    evaluate photographs_rivals operators="[${OPERATORS// /,}]" prior=photographs_prior num_samples=4 \
        tune_by='[psnr_limit,lpips]' tune_samples=2 reference="'UD2M, as shipped'" metrics='[psnr,psnr_limit,lpips,r,energy]' \
        methods="[\"$ours label=UD2M,_as_shipped\",\"$ours label=UD2M tune={step_scale:[0.7,1.0,1.4],eta:[0.0,1.0]}\",\"latino tune={$LATINO_WIDER,symmetries:[1,8]}\",\"ddrm tune={eta:[0.5,0.85,1.0],power:[2.0,3.0],symmetries:[1,8]}\"]" \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 128 59 val_limit=24)\"]"
    collect_on PHOTOGRAPHS photographs_rivals results/photographs_rivals
}

# Rivals that are trained, and one of a hundred evaluations, on fewer pieces of PHOTOGRAPHS, tuned as above.
photographs_bridges() {
    local operator bridge="target.model=$RUNS/photographs_bridge_{physics}/export"
    for operator in $OPERATORS; do
        train "photographs_bridge_$operator" experiment=photos_bridge physics="$operator" prior=photographs_prior \
            data=folder data.root="$PHOTOGRAPHS" data.tile_size=128 data.val_limit=24
    done
    evaluate photographs_bridges operators="[${OPERATORS// /,}]" prior=photographs_prior num_samples=2 \
        tune_by='[psnr_limit,lpips]' tune_samples=2 reference="'UD2M, as shipped'" metrics='[psnr,psnr_limit,lpips,r,energy]' \
        methods="[\"ud2m target.model=photographs_{physics} label=UD2M,_as_shipped\",\"i2sb $bridge label=I2SB\",\"cddb $bridge label=CDDB tune={num_steps:[3,9],consistency:[0.3,1.0,3.0]}\",\"diffpir tune={zeta:[0.3,0.8],lambda_:[3.0,7.0,20.0]}\"]" \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 128 30 val_limit=24)\"]"
    collect_on PHOTOGRAPHS photographs_bridges results/photographs_bridges
}

# A trained warm start on PHOTOGRAPHS, one evaluation more per step, beside the same training without it, which is the shipped model.
photographs_start() {
    stage photographs_start sharp "$RUNS/photographs_super_resolution_features/export" physics=super_resolution \
        network=learned training.optimizer.lr_start=1e-3 $SHARP_STEPS
    last photographs_start_sharp
    evaluate photographs_start operators='[super_resolution]' prior=photographs_prior num_samples=4 \
        methods="[\"ud2m target.model=photographs_super_resolution label=UD2M\",\"ud2m target.model=$RUNS/photographs_start_sharp/export-last target.${MORE_LEVELS// / target.} label=UD2M,_trained_warm_start\"]" \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 128 59)\"]" metrics='[psnr,psnr_limit,lpips,r,energy]' reference=UD2M
    collect_on PHOTOGRAPHS photographs_start results/photographs_start
}

# One to 21 evaluations of deblurring on PHOTOGRAPHS: the shipped model in fewer and in more steps, models of one and of four modules, and DDRM.
photographs_few() {
    local methods="" steps levels="target.grid_power=2.0 target.eta=0.0"
    stage photographs_K1 sharp photographs_gaussian_blur physics=gaussian_blur \
        network.num_blocks=1 training.sampling.num_steps=4 steps=1200 validate_every=400
    stage photographs_K4 sharp photographs_gaussian_blur physics=gaussian_blur \
        network.num_blocks=4 training.sampling.num_steps=1 steps=800 validate_every=400
    last photographs_K1_sharp
    last photographs_K4_sharp
    for steps in 1 2 3 7; do methods+="\"ud2m target.model=photographs_gaussian_blur target.num_steps=$steps label=K_=_3,_N_=_$steps\","; done
    for steps in 1 2 4; do methods+="\"ud2m target.model=$RUNS/photographs_K1_sharp/export-last target.num_steps=$steps $levels label=K_=_1,_N_=_$steps\","; done
    methods+="\"ud2m target.model=$RUNS/photographs_K4_sharp/export-last label=K_=_4,_N_=_1\",$(ddrm 0.5 2.0 1 DDRM,_best_LPIPS),"
    methods+='"ud2m target.model=photographs_gaussian_blur label=K_=_3,_N_=_5_(shipped)"'
    evaluate photographs_few operators='[gaussian_blur]' prior=photographs_prior methods="[$methods]" num_samples=4 \
        datasets="[\"$(pieces "$PHOTOGRAPHS" 128 59)\"]" \
        metrics='[psnr,psnr_limit,lpips,r,energy]' reference="'K = 3, N = 5 (shipped)'"
    collect_on PHOTOGRAPHS photographs_few results/photographs_few
}

# The shipped models on PHOTOGRAPHS in three steps at the levels of their training, and in four and five with more levels
# between the first and the last.
photographs_steps() {
    local steps grid eta methods=""
    while read -r steps grid eta; do
        methods+=",\"ud2m target.model=photographs_{physics} target.num_steps=$steps target.grid_power=$grid target.eta=$eta label=N_=_$steps,_grid_$grid,_eta_$eta\""
    done <<< $'3 5.0 1.0\n4 3.0 0.0\n5 2.0 0.0'
    evaluate photographs_steps operators="[${OPERATORS// /,},uniform_blur,jpeg]" prior=photographs_prior num_samples=4 tune=false methods="[${methods#,}]" \
        metrics='[psnr,psnr_limit,lpips,r,energy,residual]' datasets="[\"$(pieces "$PHOTOGRAPHS" 128 30)\"]" reference="'N = 3, grid 5.0, eta 1.0'"
    collect_on PHOTOGRAPHS photographs_steps results/photographs_steps --note "$BUSY"
}

# The general model on PHOTOGRAPHS at noise levels across its range.
photographs_noise() {
    local folders=() level
    for level in 0.005 0.02 0.05 0.1; do
        evaluate "photographs_noise_$level" prior=photographs_prior num_samples=2 tune_by=lpips tune_samples=1 reference=UD2M \
            operators="[\"gaussian_blur sigma_y=$level\",\"motion_blur sigma_y=$level\",\"super_resolution sigma_y=$level\"]" \
            methods='["ud2m target.model=photographs_general label=UD2M","latino tune={setting.tau_first:[0.4],setting.tau_last:[0.01,0.02,0.04,0.08,0.16],setting.width:[1.0]}"]' \
            metrics='[psnr,psnr_limit,lpips,r,energy,residual]' datasets="[\"$(pieces "$PHOTOGRAPHS" 128 30 val_limit=24)\"]"
        folders+=("results/photographs_noise_$level")
    done
    collect_on PHOTOGRAPHS photographs_noise "${folders[@]}" --note "$BUSY"
}

# The shipped models and their rivals at 256x256 on CBSD68, with the rivals' settings that were the best ones of `photographs_rivals` and `photographs_more`.
photographs_256() {
    local operator ours="ud2m target.model=photographs_{physics} label=UD2M" folders=()
    local -A rivals=(
        [gaussian_blur]="$(latino 0.4 0.01 1.0 8 LATINO,_best_PSNR),$(latino 0.4 0.02 1.4 8 LATINO,_best_LPIPS),$(ddrm 0.85 3.0 1 DDRM,_best_PSNR),$(ddrm 0.5 2.0 1 DDRM,_best_LPIPS)"
        [super_resolution]="$(latino 0.4 0.04 1.0 1 LATINO),$(ddrm 0.85 2.0 1 DDRM)"
        [inpainting]="$(latino 0.2 0.02 1.4 1 LATINO),$(ddrm 1.0 3.0 8 DDRM)"
        [jpeg]="$(latino 0.2 0.08 1.0 1 LATINO)"
    )
    for operator in $OPERATORS jpeg; do
        evaluate "photographs_256_$operator" operators="[$operator]" prior=photographs_prior num_samples=2 tune=false reference=UD2M \
            metrics='[psnr,psnr_limit,lpips,r,energy]' methods="[\"$ours\",${rivals[$operator]}]" \
            datasets="[\"$(pieces "$CBSD68" 256 34 batch_size=2)\"]"
        folders+=("results/photographs_256_$operator")
    done
    collect_on CBSD68 photographs_256 "${folders[@]}" --note "$BUSY"
}

# The shipped models on CBSD68, of which `ud2m models` tells: a folder as `data=folder` takes it, whose `test` holds the 68 images.
shipped() {
    local folders=() operator name methods
    for operator in $OPERATORS jpeg uniform_blur; do
        methods=""
        for name in "photographs_$operator" "photos_$operator" photographs_general photos_general; do
            [ -d "ud2m/pretrained/$name" ] && methods+="\"ud2m target.model=$name\","
        done
        evaluate "models_$operator" operators="[$operator]" prior=photographs_prior num_samples=4 methods="[${methods%,}]" \
            datasets="[\"$(pieces "$CBSD68" 64 70)\"]" metrics='[psnr,psnr_limit,lpips,r,energy,residual]'
        folders+=("results/models_$operator")
    done
    collect_on CBSD68 models "${folders[@]}" --note "$BUSY"
}

PARTS="prior operators losses initialisation ablations general exact mnist latent rivals fewer cost picture"
ON_FOLDERS="photographs photographs_more mixture tradeoff calibration adversarial paper_losses photographs_rivals photographs_bridges photographs_start photographs_few photographs_steps photographs_noise photographs_256 shipped"
[ $# -gt 0 ] || set -- $PARTS
for part in "$@"; do
    case " models $PARTS $ON_FOLDERS " in
        *" $part "*) "$part" ;;
        *) echo "error: unknown part $part" >&2 && exit 2 ;;
    esac
done
"$PYTHON" benchmarks/plots.py
"$PYTHON" benchmarks/results.py render
