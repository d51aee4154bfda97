"""Plant known mistakes one at a time and see that some test fails for each.

    python scripts/mutants.py                    all of them, some minutes on one core
    python scripts/mutants.py --only ct-noise    one

Every mistake below was made in some public implementation, or is the nearest misreading of a paper. The repository is
copied for each, never touched: one text is replaced, and the tests named beside it have to notice.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parent.parent
COPIED = ("cm_train", "conf", "tests", "pyproject.toml")
PATIENCE_S = 300.0  # for the tests of one mistake


class Mutant(NamedTuple):
    """One mistake: `old`, which `file` holds exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # what pytest runs, separated by blanks
    what: str


PROOFS, OBJECTIVES, TRAINER = (
    "tests/test_proofs.py",
    "tests/objectives/test_objectives.py",
    "tests/training/test_trainer.py",
)
DENOISER, SAMPLING, ECT = (
    "tests/models/test_denoiser.py",
    "tests/sampling/test_samplers.py",
    "tests/objectives/test_ect.py",
)
NOISE, EMA, DISTANCES = (
    "tests/objectives/test_noise.py",
    "tests/models/test_averages.py",
    "tests/objectives/test_distances.py",
)
HARM = "tests/commands/test_harm.py"
OPTIMIZERS, IMAGES, RNG = "tests/training/test_optimizers.py", "tests/data/test_pixels.py", "tests/core/test_rng.py"
EDM_CODE, CONSISTENCY = "cm_train/objectives/edm.py", "cm_train/objectives/consistency.py"
ECT_CODE, STATE_CODE = "cm_train/objectives/ect.py", "cm_train/training/state.py"
SCM_CODE, SCM, GUIDANCE = (
    "cm_train/objectives/scm.py",
    "tests/objectives/test_scm.py",
    "tests/sampling/test_guidance.py",
)
SONG, SONG_CODE = "tests/models/test_songunet.py", "cm_train/models/backbones/songunet.py"
DENOISER_CODE, NOISE_CODE = "cm_train/models/denoiser.py", "cm_train/objectives/noise.py"
HEUN_CODE, MULTISTEP_CODE, ODE_CODE = (
    "cm_train/sampling/samplers/heun.py",
    "cm_train/sampling/samplers/multistep.py",
    "cm_train/sampling/samplers/ode.py",
)
EMA_CODE, DISTANCES_CODE, OPTIMIZERS_CODE = (
    "cm_train/models/averages.py",
    "cm_train/objectives/distances.py",
    "cm_train/training/optimizers.py",
)
EDM2_CODE, WEIGHTING_CODE = "cm_train/models/backbones/edm2.py", "cm_train/objectives/weighting.py"
EDM2, WEIGHTING = "tests/models/test_edm2.py", "tests/objectives/test_weighting.py"

# fmt: off
MUTANTS = [Mutant(*row) for row in (
    # ------------------------------------------------------------------------------------------------ diffusion teacher
    ("edm-weight-sigma", EDM_CODE, "(sigma**2 + data**2) / (sigma * data) ** 2", "1 / sigma**2", OBJECTIVES,
     "the weight without the data's share"),
    ("edm-weight-root", EDM_CODE, "(sigma**2 + data**2) / (sigma", "(sigma**2 + data**2) ** 0.5 / (sigma", OBJECTIVES,
     "the weight with a root that belongs to c_out"),
    ("edm-noise-variance", EDM_CODE, "per_image(sigma, x0)", "per_image(sigma**2, x0)", OBJECTIVES,
     "noise scaled by its variance"),
    # --------------------------------------------------------------------------------------------------- EDM2's network
    ("edm2-never-normalised", STATE_CODE, "constrain(self.objective.denoiser, applied)", "pass",
     TRAINER + "::test_weights_have_their_length_before_averages_and_target_read_them",
     "weights that grow with every step"),
    ("edm2-skipped-step", EDM2_CODE, "torch.where(applied > 0, size, 1.0)", "size", EDM2,
     "weights that a skipped step moves"),
    ("edm2-concatenation", EDM2_CODE, "[a * scale_a, b * scale_b]", "[a, b]", EDM2,
     "skips that weigh by their width"),
    ("edm2-values", EDM2_CODE, "normalized(qkv, 3)",
     "torch.cat([normalized(qkv[:, :2], 3), qkv[:, 2:]], dim=1)", EDM2, "values of attention not normalised"),
    ("edm2-uncertainty", EDM_CODE, "weighted(loss, sigma)", "weighted(distance, sigma)", WEIGHTING,
     "the uncertainty of a loss without its weights"),
    # -------------------------------------------------------------------------------------------------- preconditioning
    ("c-out-root", DENOISER_CODE, "shifted * data * inverse_root", "shifted * data * inverse_root**2",
     DENOISER, "c_out without its square root"),
    ("c-in-root", DENOISER_CODE, "per_image(c_in, x) * x", "per_image(c_in**2, x) * x", DENOISER,
     "c_in without its square root"),
    ("c-skip-shift", DENOISER_CODE, "(shifted / data) ** 2", "(sigma / data) ** 2", DENOISER,
     "c_skip of the diffusion model: no boundary at sigma_min"),
    ("c-out-shift", DENOISER_CODE, "shifted * data * inverse_root",
     "shifted * data * torch.rsqrt(shifted**2 + data**2)", DENOISER, "sigma_min subtracted under c_out's root too"),
    ("no-shift", DENOISER_CODE, "shifted = sigma - self.config.sigma_boundary", "shifted = sigma", DENOISER,
     "the diffusion model's coefficients in a consistency model"),
    ("c-noise-1000", DENOISER_CODE, "sigma.log() / 4", "sigma.log() * 250", DENOISER,
     "OpenAI's factor of 1000 on c_noise"),
    # --------------------------------------------------------------------------------------------------------- networks
    ("song-cosines-first", SONG_CODE, "[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]", SONG,
     "the embedding's halves as the ADM network has them"),
    ("song-label-scale", SONG_CODE, "columns * math.sqrt(self.num_classes)", "columns", SONG,
     "one-hot labels of variance 1 / K"),
    ("song-attends-too-often", SONG_CODE, "listed[level] and i == config.num_blocks", "listed[level]", SONG,
     "attention in every block of the decoder"),
    ("song-identity", SONG_CODE, "if cin != cout or direction else", "if cin != cout else", SONG,
     "no convolution beside one that resamples"),
    ("song-pyramid-edge", SONG_CODE, "cin, cout, 3, padding=1 + (len(config.resample_filter) - 1) // 2)\n"
     '        self.resample = Resample(config.resample_filter, "down", padding=0)',
     'cin, cout, 3)\n        self.resample = Resample(config.resample_filter, "down")', SONG,
     "the pyramid's filter sees zeros where the convolution had answers"),
    ("song-pyramid-image", SONG_CODE, "h = image = self.pyramid[level - 1](image, h)",
     "h = self.pyramid[level - 1](image, h)", SONG, "the pyramid goes on with the image itself"),
    ("snapshots-round-buffers", "cm_train/models/checkpoints/posthoc.py", "if name in trained else value",
     "if value.is_floating_point() else value", SONG, "constants summed with the weights"),
    # ----------------------------------------------------------------------------------------- consistency distillation
    ("cd-solver", CONSISTENCY, 'self.config.solver == "heun"', 'self.config.solver == "euler"', OBJECTIVES,
     "a setting that does not reach the loss: Euler for Heun"),
    ("cd-backwards", CONSISTENCY, "x, sigma, sigma_next)", "x, sigma_next, sigma)", OBJECTIVES,
     "the teacher's step from the lower level up"),
    ("cd-teacher-dropout", CONSISTENCY, "step(self._teacher(labels), x",
     "step(lambda x, sigma: self.teacher(x, sigma, labels, keys), x", OBJECTIVES, "the teacher in training mode"),
    ("cd-teacher-labels", CONSISTENCY, "self.teacher(x, sigma, labels)", "self.teacher(x, sigma)", OBJECTIVES,
     "the teacher is not told the class"),
    ("cd-goal-level", CONSISTENCY, "target(x_next, sigma_next,", "target(x_next, sigma,", OBJECTIVES,
     "the goal asked at the upper level"),
    ("mu-swapped", CONSISTENCY, '(self.config.target_schedule == "openai")', '(self.config.target_schedule == "paper")',
     OBJECTIVES, "the paper's and OpenAI's mu(k) swapped"),
    ("mu-intervals", CONSISTENCY, "self.noise.num_scales(step) - (", "self.noise.num_scales(step) - 1 + 0 * (",
     OBJECTIVES, "mu(k) from N - 1 always (OpenAI, the JAX code)"),
    ("mu-next-step", CONSISTENCY, "self.target_decay(step), applied", "self.target_decay(step + 1), applied",
     OBJECTIVES, "mu(k) read after k has moved on"),
    # --------------------------------------------------------------------------------------------- consistency training
    ("ct-noise", CONSISTENCY, "(sigma_next, x0) * noise", "(sigma_next, x0) * torch.randn_like(noise)", OBJECTIVES,
     "fresh noise for the second point"),
    ("ct-gradient", CONSISTENCY, "torch.no_grad()", "torch.enable_grad()",
     PROOFS + "::test_ct_gradient_vanishes_at_its_fixed_point_and_not_at_the_exact_function",
     "a gradient through the goal"),
    ("ct-grows-on", NOISE_CODE,
     "return min(math.ceil(math.sqrt(done * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1), s1) + 1",
     "return math.ceil(math.sqrt(step / schedule_steps * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1", NOISE,
     "N(k) grows past its end"),
    ("ct-points", NOISE_CODE, "+ s0**2) - 1), s1) + 1", "+ s0**2) - 1), s1)", NOISE,
     "intervals taken for points"),
    # --------------------------------------------------------------------------------------------------- target network
    ("target-never", CONSISTENCY, "if self.target_weights is not None:", "if False:", OBJECTIVES,
     "the target is never updated"),
    ("target-before", STATE_CODE,
     "grad_norm, applied = self.optimizer.step(step, 1 / self.loss_scale.factor)\n"
     "        # Averages, target and checkpoints see no weights off their surface.\n"
     "        constrain(self.objective.denoiser, applied)\n"
     "        self.objective.after_step(step, self.weights, applied)",
     "old = self.weights.clone()\n"
     "        grad_norm, applied = self.optimizer.step(step, 1 / self.loss_scale.factor)\n"
     "        constrain(self.objective.denoiser, applied)\n"
     "        self.objective.after_step(step, old, applied)",
     TRAINER + "::test_target_follows_the_weights_that_the_step_made", "the target is updated before the step"),
    ("target-of-ema", STATE_CODE, "after_step(step, self.weights, applied)",
     "after_step(step, self.averages[0].weights, applied)",
     TRAINER + "::test_target_follows_the_weights_that_the_step_made", "the target follows the sampling average"),
    ("target-dropout", CONSISTENCY, "sigma_next, labels, keys)", "sigma_next, labels, ~keys)", OBJECTIVES,
     "student and target under different dropout masks (OpenAI on a GPU)"),
    ("target-skipped", CONSISTENCY, "self.target_decay(step), applied)", "self.target_decay(step))", OBJECTIVES,
     "the target moves on a skipped step"),
    # -------------------------------------------------------------------------------------------------------------- iCT
    ("huber-elementwise", DISTANCES_CODE, "return s / (torch.sqrt(s + c * c) + c)",
     "return (torch.sqrt(difference.square() + c * c) - c).sum(1)", DISTANCES, "one root a pixel (Kinyugo)"),
    ("huber-c", DISTANCES_CODE, "0.00054 * difference.shape[1] ** 0.5", "0.00054", DISTANCES,
     "c without the root of the dimension"),
    ("huber-c-unread", CONSISTENCY, '{"huber_c": self.huber_c}', "{}", OBJECTIVES, "a setting the loss never hears of"),
    ("ict-no-weight", CONSISTENCY, "else 1 / (sigma - sigma_next)", "else 1.0", OBJECTIVES, "no weight"),
    ("ict-weight-sigma", CONSISTENCY, "else 1 / (sigma - sigma_next)", "else 1 / sigma", OBJECTIVES,
     "the weight from the level, not from the gap"),
    ("ict-proposal-root", NOISE_CODE, "(math.sqrt(2) * self.config.std)", "self.config.std", NOISE,
     "erf without its root of 2 on the grid"),
    ("ict-stages", NOISE_CODE, "(math.log2(s1 // s0) + 1)", "math.log2(s1 // s0)", NOISE,
     "one stage too few in K'"),
    ("ict-points", NOISE_CODE, "(step // stage_steps, 64), s1) + 1", "(step // stage_steps, 64), s1)", NOISE,
     "intervals taken for points"),
    # -------------------------------------------------------------------------------------------------------------- ECT
    ("ect-clean-goal", ECT_CODE, "goal = torch.where(per_image(clean, x0), x0, goal)", "pass", ECT,
     "r = 0 not masked to the image"),
    ("ect-boundary", ECT_CODE, 'boundary = "zero"', 'boundary = "sigma_min"', ECT,
     "coefficients with the identity at sigma_min, under a goal without noise"),
    ("ect-power", ECT_CODE, "c.q ** (self.stage(step) + 1)", "c.q ** self.stage(step)", ECT, "q^s for q^(s + 1)"),
    ("ect-sigmoid", ECT_CODE, "torch.sigmoid(-c.b", "torch.sigmoid(c.b", ECT, "the sigmoid's sign"),
    ("ect-stage", ECT_CODE, "min(step * self", "min((step + 1) * self", ECT, "the stage from step + 1"),
    ("ect-gradient", ECT_CODE, "torch.no_grad()", "torch.enable_grad()", ECT, "a gradient through the goal"),
    ("ect-dropout", ECT_CODE, "sigma_next), labels, keys)", "sigma_next), labels, ~keys)", ECT,
     "the two passes under different dropout masks"),
    ("ect-weight", ECT_CODE, "return 1 / (sigma - sigma_next)", "return 1 / sigma", ECT,
     "the weight from the level, not from the gap"),
    # ------------------------------------------------------------------------------------------- continuous time (sCM)
    ("scm-sigma-data", SCM_CODE, "cos * sin * velocity / data, sigma)", "cos * sin * velocity, sigma)", SCM,
     "sigma_data once more in the direction of the derivative"),
    ("scm-angle", SCM_CODE, "(direction, sigma))\n", "(direction, sigma / 2))\n", SCM,
     "a wrong factor on the noise level's own tangent"),
    ("scm-sign", SCM_CODE, "goal = output + self._bounded(g)", "goal = output - self._bounded(g)", SCM,
     "the tangent's sign"),
    ("scm-square", SCM_CODE, "g = -(cos**2) *", "g = -cos *", SCM, "cos for cos^2"),
    ("scm-rms", SCM_CODE, "torch.linalg.vector_norm(g.flatten(1), dim=1)",
     "g.flatten(1).square().mean(1).sqrt()", SCM, "the tangent normalised by its root mean square"),
    ("scm-weight-sign", WEIGHTING_CODE, "w.exp() * loss - w", "w.exp() * loss + w", SCM,
     "the learned weighting without its counterweight"),
    ("scm-warmup", SCM_CODE, "min(1.0, step / num)", "step / num", SCM, "a tangent that goes on growing"),
    ("scm-dropout", SCM_CODE, "labels, batch.dropout_keys).to", "labels, None).to", SCM,
     "no dropout in the student"),
    ("scm-gradient", SCM_CODE, "with torch.no_grad():\n            exact, derivative",
     "if True:\n            exact, derivative", SCM, "a gradient through the derivative and the goal"),
    # ------------------------------------------------------------------------------------------------------- guidance
    ("guidance-shift", "cm_train/sampling/guidance.py", "without + self.guidance", "within + self.guidance", GUIDANCE,
     "LCM's w for the guidance scale"),
    ("guidance-null", "cm_train/sampling/guidance.py", "torch.full_like(labels, self.config.num_classes)",
     "torch.zeros_like(labels)", GUIDANCE, "the first class in the null label's place"),
    # ------------------------------------------------------------------------------------------------ grids, proposals
    ("grid-intervals", "cm_train/models/noise_levels.py", "linspace(0, 1, num, dtype=torch.float64)",
     "linspace(0, 1, num + 1, dtype=torch.float64)[:-1]", NOISE, "N intervals for N points"),
    ("lognormal-root", NOISE_CODE, "self.config.std * math.sqrt(2) *", "self.config.std *", NOISE,
     "erfinv without its root of 2"),
    # --------------------------------------------------------------------------------------------------------- sampling
    ("renoise-plain", MULTISTEP_CODE, "(sigma**2 - boundary**2) ** 0.5", "sigma", SAMPLING,
     "re-noising by sigma itself (ECT)"),
    ("heun-level", HEUN_CODE, "x + step * first, sigma_next)", "x + step * first, sigma)", SAMPLING,
     "Heun's second slope at the first level"),
    ("heun-point", HEUN_CODE, "x + step * first, sigma_next)", "x, sigma_next)", SAMPLING,
     "Heun's second slope at the first point"),
    ("last-step", ODE_CODE, "return denoise(x, levels[-1])", "return x", SAMPLING,
     "no last step to 0: the noise of sigma_min stays"),
    ("uint8-truncated", "cm_train/data/pixels.py", "* 127.5 + 128)", "* 127.5 + 127.5)", IMAGES,
     "truncation to 8 bits, half a level too dark (OpenAI)"),
    # --------------------------------------------------------------------------------------------------------- averages
    ("ema-warmup", EMA_CODE, "return min(decay, (1 + step) / (10 + step))", "return decay", EMA, "no warm-up"),
    ("ema-swapped", EMA_CODE, "1 - decay if applied is None else applied * (1 - decay)",
     "decay if applied is None else applied * decay", EMA, "decay and 1 - decay swapped"),
    ("ema-skipped", EMA_CODE, "1 - decay if applied is None else applied * (1 - decay)", "1 - decay", EMA,
     "averages move on a skipped step"),
    ("ema-half-life", EMA_CODE, "min(decay, 0.5 **", "max(decay, 0.5 **", EMA,
     "the longer of two half-lives"),
    ("ema-half-life-images", EMA_CODE, "batch_size / self.half_life_images", "1 / self.half_life_images", EMA,
     "a half-life in steps"),
    # -------------------------------------------------------------------------------------------- optimizer, schedules
    ("adam-mean", OPTIMIZERS_CODE, "out=self.gradient), (1 / (1 - beta1**t)).float()",
     "out=self.gradient), torch.ones_like(t).float()", OPTIMIZERS, "no bias correction of Adam's mean"),
    ("adam-square", OPTIMIZERS_CODE, "root = torch.sqrt(1 - beta2**t)", "root = torch.ones_like(t)",
     OPTIMIZERS, "no bias correction of Adam's square"),
    ("adam-count", OPTIMIZERS_CODE, "self.count += applied", "self.count += 1", OPTIMIZERS,
     "a skipped step counts for the bias corrections"),
    ("radam-threshold", OPTIMIZERS_CODE, "adaptive = rho > 5", "adaptive = rho > 4", OPTIMIZERS,
     "RAdam's threshold as its paper prints it, where every implementation has 5"),
    ("lr-past-end", OPTIMIZERS_CODE, "min(step, self.schedule_steps) / self", "step / self", OPTIMIZERS,
     "the cosine comes back beyond its end"),
    ("schedule-steps", "cm_train/training/config.py", "self.schedule_steps is None else", "True else",
     TRAINER + "::test_schedules_count_to_schedule_steps_however_long_the_run",
     "a longer run bends the schedules of the one it goes on with"),
    # ------------------------------------------------------------------------------------------------------- randomness
    ("rows-ignored", "cm_train/objectives/base.py", "Draws(self.seed, step, rows,",
     "Draws(self.seed, step, range(len(rows)),", OBJECTIVES, "every micro-batch and rank draws the same noise"),
    ("step-ignored", "cm_train/core/rng.py",
     "generator(draws.seed, stream, draws.step,", "generator(draws.seed, stream, 0,",
     RNG, "every step draws the same noise"),
    ("micro-batch-mean", "cm_train/training/steps.py", "self.world.size / self.config.batch_size",
     "self.world.size / self.micro_batch",
     TRAINER + "::test_micro_batches_change_nothing_but_memory", "micro-batches added up, not averaged"),
    # ---------------------------------------------------------------------------------------- compiler, device, memory
    ("metric-is-loss", "cm_train/objectives/base.py", "value.detach().double()", "value.detach().clone()",
     "tests/models/test_compiling.py", "a metric that a compiler may return as the loss, without its gradient"),
    ("twin-with-weights", "cm_train/models/compiling.py",
     "nn.Parameter(p.detach(),", "nn.Parameter(p.detach().clone(),",
     "tests/models/test_compiling.py", "the pass without gradient goes on with the weights of the start"),
    ("kind-without-settings", "cm_train/models/compiling.py",
     "m.extra_repr(), _plain_attributes(m))", "m.extra_repr())",
     "tests/models/test_compiling.py", "blocks with another dropout share a graph"),
    ("tf32-for-fp32", "cm_train/core/precision.py", 'cudnn.allow_tf32 = kind == "tf32"', "cudnn.allow_tf32 = True",
     "tests/core/test_precision.py", "fp32 whose convolutions are cuDNN's TF32"),
    ("torn-step-saved", "cm_train/training/trainer.py",
     "if not self.state.is_torn:", "if True:", "tests/training/test_memory.py",
     "a checkpoint of a step that memory ran out in the middle of"),
    ("pictures-online", "cm_train/training/tracking/config.py",
     'return published if self.previews == "auto" else self.previews', "return self.previews is not False",
     "tests/runs/test_train.py", "previews of private photos sent wherever there is a login"),
    ("ratio-of-nothing", STATE_CODE, "norm(direction) * factor.abs()", "norm(self.gradient)", TRAINER,
     "an update ratio without the learning rate"),
    ("sums-on-device", "cm_train/models/checkpoints/posthoc.py",
     'torch.zeros_like(value, device="cpu")', "torch.zeros_like(value)",
     "tests/models/test_posthoc.py", "files' tensors added to those of a GPU"),
    # --------------------------------------------------------------------------------------- runs, folders and machines
    ("saves-forgotten", "cm_train/models/checkpoints/read.py", "    if has_saved:", "    if False:",
     f"{HARM}::test_a_run_whose_checkpoints_are_out_of_sight_never_starts_over",
     "a run whose checkpoints are out of sight starts over"),
    ("passing-is-damage", "cm_train/core/files.py", "error.errno is not None and error.errno not in _LASTING",
     "False", f"{HARM}::test_a_read_that_fails_for_a_moment_is_tried_again",
     "a disk that falters for a moment has damaged a checkpoint"),
    ("foreign-folder", "cm_train/runs/lock.py", "not set(stored) >= _KEYS", "False",
     f"{HARM}::test_a_folder_of_somebody_else_is_refused_untouched", "a run on top of somebody's project"),
    ("links-followed", "cm_train/runs/lock.py", "if os.path.islink(folder / name):", "if False:",
     f"{HARM}::test_a_run_does_not_follow_links_out_of_itself", "writing and pruning where a stranger's link leads"),
    ("heard-by-all", "cm_train/runs/launch.py", "**_loopback()", "**{}",
     "tests/runs/test_ddp.py::test_ranks_of_one_machine_listen_to_it_alone_and_leave_nothing_behind",
     "ranks of one machine that the whole network can talk to"),
    ("asleep-is-hung", "cm_train/core/waiting.py", "min(now - then, 2 * tick)", "now - then",
     "tests/core/test_waiting.py",
     "a suspended job counts as one that hangs"),
    ("stale-snapshots", "cm_train/models/checkpoints/posthoc.py",
     "if of.snapshots is None else of.snapshots", "if True else of.snapshots",
     f"{HARM}::test_an_average_is_made_of_the_snapshots_that_its_checkpoint_lists",
     "averages made of snapshots of another past"),
    ("needed-pruned", "cm_train/models/checkpoints/write.py", "if not is_needed(f) and", "if",
     f"{HARM}::test_a_student_goes_on_with_the_teacher_that_it_began_with",
     "a teacher's run deletes what its student goes on with"),
    ("vanished-is-damaged", "cm_train/models/checkpoints/vanishing.py",
     "        raise Vanished(folder) from None", "        raise",
     "tests/models/test_vanishing.py::test_a_run_that_is_being_written_can_be_read",
     "a checkpoint that its run removed meanwhile counts as damaged"),
    ("looks-once", "cm_train/models/checkpoints/vanishing.py", "range(_TRIES - 1)", "range(0)",
     "tests/models/test_vanishing.py::test_a_teacher_that_is_still_in_training_can_be_learnt_from",
     "a run in training whose newest checkpoint is replaced can't be read"),
    # ------------------------------------------------------------------------------------------------------- cm-sample
    ("images-overwritten", "cm_train/commands/sample_folder.py", "            if differences:", "            if False:",
     "tests/commands/test_sample.py::test_another_request_is_refused_with_its_differences_and_changes_nothing",
     "images of two checkpoints in one folder"),
    ("torn-image-kept", "cm_train/commands/sample_files.py", "read_png(self._path(place), self._shape) is not None",
     "True", "tests/commands/test_sample.py::test_the_same_request_goes_on_where_it_was_stopped",
     "half an image counts as one that is there"),
    ("torn-row-kept", "cm_train/commands/sample_files.py", "file.truncate(places[0] * self._size)", "pass",
     "tests/commands/test_sample.py::test_the_same_request_goes_on_where_it_was_stopped",
     "half an image in the middle shifts all pixels after it"),
    ("numbers-win", "cm_train/sampling/labels.py", "if str(label) in known:", "if label in known:",
     "tests/sampling/test_labels.py::test_class_numbers_are_those_of_the_names_or_the_numbers_themselves",
     "labels=2 means the class of number 2 where another is called so"),
    ("batches-regrouped", "cm_train/commands/boundaries.py", "start = place - place % size", "start = place",
     "tests/commands/test_sample.py::test_an_interruption_leaves_no_trace_in_the_batches",
     "what an interruption has left is drawn in other batches than it would have been"),
    ("end-forgotten", "cm_train/commands/sample_folder.py", "sorted({*self.ends, self.num})", "sorted(self.ends)",
     "tests/commands/test_sample.py::test_what_is_added_is_drawn_in_batches_of_its_own",
     "a larger num draws images again that were there"),
    ("lost-behind", "cm_train/commands/behind.py", "if self._error is not None and error is not self._error:",
     "if False:", "tests/commands/test_behind.py",
     "the last images could not be written, and nobody says so"),
    ("note-of-the-first", "cm_train/commands/picture_notes.py", "request.seed + place for place in places",
     "request.seed for place in places", "tests/commands/test_redraw.py::test_a_picture_says_what_made_it",
     "every picture of a request tells the seed of its first"),
    ("any-checkpoint", "cm_train/commands/redraw.py", "_hash(read_manifest(folder), note) == note.sha256", "True",
     "tests/commands/test_redraw.py::test_its_checkpoint_is_found_by_its_hash",
     "a picture is compared with what another checkpoint draws"),
    ("turns-restart", "cm_train/commands/sample_folder.py", "several[place % len(several)]",
     "several[-1 - place % len(several)]",
     "tests/commands/test_sample.py::test_several_classes_take_turns_however_many_images",
     "classes that take turns are drawn in another order than the grid says"),
    ("noise-of-the-first", "cm_train/sampling/generate.py", "noise[rows]", "noise[: len(rows)]",
     "tests/sampling/test_generate.py::test_noise_of_ones_own_takes_the_place_of_the_seeds",
     "every batch begins with the first one's noise"),
    ("stop-is-forgotten", "cm_train/commands/from_python.py", "raise KeyboardInterrupt", "return Path()",
     "tests/commands/test_from_python.py::test_a_signal_saves_first_and_is_told",
     "a notebook goes on below a cell that was stopped"),
    # ------------------------------------------------------------------------------------------------------------- data
    ("captions-of-others", "cm_train/training/previews.py", "captions(denoiser, NUM_PREVIEWS)",
     "captions(denoiser, range(1, NUM_PREVIEWS + 1))",
     "tests/training/test_previews.py::test_pictures_of_classes_name_them",
     "a preview's classes are its neighbours'"),
    ("one-order", "cm_train/data/loader.py", '"order", epoch, len(self.dataset)', '"order", 0, len(self.dataset)',
     "tests/data/test_loader.py", "every epoch in the first one's order"),
    ("image-left-out", "cm_train/data/loader.py", "divmod(position, size)", "divmod(position, size - 1)",
     "tests/data/test_loader.py", "epochs that are one image short"),
    ("ten-before-two", "cm_train/data/image_labels.py", '(len(part.lstrip("0")), part.lstrip("0"))', "(0, part)",
     "tests/data/test_image_folders.py", "class 10 before class 2"),
    ("held-out-learnt", "cm_train/data/datasets/image_folder.py", 'if c.part == "held_out" else ~found.mask',
     'if c.part == "held_out" else found.mask | True',
     "tests/data/test_held_out.py", "what is held out is trained on all the same"),
    ("variants-apart", "cm_train/data/held_out.py", "key if text is None else text.encode(errors=\"backslashreplace\")",
     "key", "tests/data/test_held_out.py", "near copies of what is held out are trained on"),
    ("parts-of-one-name", "cm_train/data/datasets/image_folder.py", "[c.part, c.holdout, c.group]",
     "[c.holdout, c.group]", "tests/data/test_held_out.py", "what was trained on passes for what was held out"),
    ("lying-down", "cm_train/data/decoding.py", "ImageOps.exif_transpose(image, in_place=True)", "pass",
     "tests/data/test_datasets.py", "photographs lie on their side"),
    ("turned-back", "cm_train/data/augmentation.py", "_rotation(self.turn) @ _rotation(-self.direction)",
     "_rotation(-self.turn) @ _rotation(-self.direction)", "tests/data/test_augmentation.py",
     "an augmented image is turned the other way than its label says"),
    ("augmented-unsaid", "cm_train/objectives/edm.py", "else (batch.augment_labels,)", "else ()",
     "tests/data/test_augmentation.py", "the network is not told how its images were augmented"),
    ("rows-of-heads", "cm_train/models/formats/base.py", 'for axis in ("qkv", "head", "channel")]',
     'for axis in ("qkv", "channel", "head")]', "tests/models/test_formats.py",
     "attention's rows of a foreign file mixed"),
    ("told-a-quarter", "cm_train/models/formats/openai.py", "noise_multiplier=1000.0", "noise_multiplier=250.0",
     "tests/models/test_formats.py", "OpenAI's networks told a noise level of another scale"),
    ("pickles-call", "cm_train/models/formats/pickles.py",
     'raise ValueError(f"it names {module}.{name}, which no network is made of")',
     "return super().find_class(module, name)", "tests/models/test_formats.py",
     "a stranger's pickle runs what it names"),
    ("kept-after-all", "cm_train/models/backbones/base.py", "block.recomputed = True", "pass",
     "tests/models/test_recomputing.py", "activation checkpointing that keeps everything"),
    # ------------------------------------------------------------------------------------------------------- evaluation
    ("frechet-cross", "cm_train/evaluation/metrics/frechet.py", "- 2 * cross", "- cross",
     "tests/evaluation/test_metrics.py", "the root of the covariances counted once"),
    ("frechet-count", "cm_train/evaluation/metrics/frechet.py", "(x - mean) / (len(x) - 1) ** 0.5",
     "(x - mean) / len(x) ** 0.5", "tests/evaluation/test_metrics.py", "a covariance by n, and not n - 1"),
    ("kid-biased", "cm_train/evaluation/metrics/kid.py",
     "(_sum(x, x) - itself) / (len(x) * (len(x) - 1))", "_sum(x, x) / len(x) ** 2",
     "tests/evaluation/test_metrics.py", "each image is compared with itself too"),
    ("kid-unscaled", "cm_train/evaluation/metrics/kid.py", "@ y.T / x.shape[1] + 1", "@ y.T + 1",
     "tests/evaluation/test_metrics.py", "a kernel that grows with the number of features"),
    ("pr-exchanged", "cm_train/evaluation/metrics/precision_recall.py", "\"recall\": found[\"recall\"]",
     "\"recall\": found[\"precision\"]", "tests/evaluation/test_metrics.py", "recall that is precision"),
    ("own-neighbour", "cm_train/evaluation/metrics/density.py", "nearest(there, there, k + 1).distance[:, k]",
     "nearest(there, there, k).distance[:, k - 1]", "tests/evaluation/test_metrics.py", "each is its own neighbour"),
    ("copies-of-held-out", "cm_train/evaluation/metrics/memorisation.py",
     "nearest(others, there, 1).distance", "nearest(there, others, 1).distance", "tests/evaluation/test_metrics.py",
     "how far training pictures are from held-out ones, not the other way round"),
    ("same-halves", "cm_train/evaluation/measure.py", '"half", i, len(samples)', '"half", 0, len(samples)',
     "tests/evaluation/test_measure.py", "ten times the same half, which never differ"),
    ("any-reference", "cm_train/evaluation/protocol.py", "(self.reference.sha256, other.reference.sha256)",
     "(self.reference.what, other.reference.what)", "tests/evaluation/test_measure.py",
     "numbers against other pictures share a table where their folders are called alike"),
    ("unpickled", "cm_train/evaluation/npz_files.py", "allow_pickle=False", "allow_pickle=True",
     "tests/evaluation/test_sources.py", "an npz may run code"),
    ("same-padding", "cm_train/evaluation/features/efficientnet_lite.py", "needed // 2, needed - needed // 2",
     "needed - needed // 2, needed // 2", "tests/evaluation/test_features.py", "padding on the other side"),
    ("spread-inverted", "cm_train/evaluation/metrics/agreement.py", "(x.std() / y.std())", "(y.std() / x.std())",
     "tests/evaluation/test_metrics.py", "blur reported as sharpness"),
    # ------------------------------------------------------------------------------------------------------------- runs
    ("auto-overrules", "cm_train/runs/plan.py", "    if inner.get(last) == AUTO:\n        inner[last] = rule()",
     "    inner[last] = rule()", "tests/runs/test_plan.py::test_settle_keeps_what_somebody_has_set",
     "what a user has set is settled by the data all the same"),
    ("teacher-for-nothing", "cm_train/runs/budget.py", "(whole.less(part), part) if", "(whole, part) if",
     "tests/runs/test_budget.py::test_a_teacher_that_is_trained_first_has_its_part",
     "a student takes the whole budget beside its teacher's part"),
    ("measuring-is-free", "cm_train/runs/budget.py", "budget.amount - spent_s()", "budget.amount",
     "tests/runs/test_budget.py::test_what_was_spent_before_counts", "a run ends late by what was spent before it"),
    ("others-pictures", "cm_train/runs/naming.py", "not pictures.are_in(run, known)", "False",
     "tests/runs/test_naming.py::test_other_pictures_of_that_name_get_six_digits",
     "other pictures of one name get into a run that has others"),
    ("first-preview-late", "cm_train/training/config.py", "return step in (first, self.steps) or",
     "return step == self.steps or",
     "tests/runs/test_budget.py::test_previews_come_after_a_hundredth_then_evenly_and_at_the_end",
     "nothing to see before the first tenth of a run"),
    ("memory-filled", "cm_train/training/micro_batch.py", "_SHARE * needed.free", "needed.free",
     "tests/training/test_micro_batch.py::test_settle_takes_the_largest_divisor_that_fills_half_of_what_is_free",
     "a micro-batch that leaves no memory to anybody else"),
    ("long-side", "cm_train/data/survey.py", "statistics.median(min(side)", "statistics.median(max(side)",
     "tests/data/test_survey.py::test_image_size_is_the_largest_not_above_the_median_short_side",
     "pictures enlarged on their short side"),
    ("tracker-pins-run", "cm_train/runs/same_run.py", '{key, key.split(".")[0]} & free', "{key} & free",
     "tests/runs/test_run_folder.py", "another tracker is another run"),
    ("network-not-inherited", "cm_train/runs/inheritance.py",
     "return config if source is None else _with_backbone(", "return config if source is not None else _with_backbone(",
     "tests/runs/test_train.py", "a student of another network than its teacher's"),
    ("teacher-for-ever", "cm_train/runs/teachers.py", "newest.finished or newest.step >= read_back(home).steps",
     "newest.finished",
     "tests/runs/test_train.py", "a teacher whose steps were lowered to what it has is trained on"),
    ("swept-teacher", "cm_train/runs/config.py", "_SHARED_WITH_TEACHER - swept", "_SHARED_WITH_TEACHER",
     "tests/runs/test_train.py", "whichever job comes first decides about the teacher of all"),
    ("schedules-grow", "cm_train/runs/lifecycle.py", "if config.schedule_steps is None:", "if False:",
     "tests/runs/test_train.py", "schedules stretch as a run is lengthened"),
    # ----------------------------------------------------------------------------------------------------------- sweeps
    ("dead-is-running", "cm_train/sweeps/records.py", "j.state = JobState.KILLED", "pass",
     "tests/sweeps/test_sweeps.py::test_table_reads_what_died_as_killed_and_fills_up_the_grid",
     "a killed job is said to run for ever"),
    ("names-meet", "cm_train/sweeps/naming.py",
     'f"{name[: _LONGEST_RUN - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"', "name[:_LONGEST_RUN]",
     "tests/sweeps/test_sweeps.py::test_name_that_was_set_is_told_apart_by_mode", "two long names are one folder"),
    ("refused-is-failed", "cm_train/sweeps/leader.py", "bad <= {JobState.REFUSED}", "bad >= {JobState.REFUSED}",
     "tests/sweeps/test_sweeps.py::test_exit_code", "a failed job is said to be wrong input"),
    ("waits-for-strangers", "cm_train/sweeps/job.py", "if not error.is_kin:", "if error.is_kin:",
     "tests/sweeps/test_sweeps.py::test_job_waits_for_another_of_its_sweep_and_for_nobody_else",
     "a job waits for a run of somebody else's"),
)]
# fmt: on


def copy_of_repository(folder: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def plant(mutant: Mutant, folder: Path) -> None:
    """Make the mistake in a copy of the repository. Raises ValueError where its text is not there exactly once."""
    path = folder / mutant.file
    source = path.read_text()
    if (found := source.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} holds its text {found} times")
    path.write_text(source.replace(mutant.old, mutant.new))


def run_tests(folder: Path, tests: list[str], patience_s: float = PATIENCE_S) -> tuple[int, str]:
    """pytest's exit status and output, with the package of `folder`; of whole files, long tests are left out."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    files, named = ([test for test in tests if ("::" in test) == is_named] for is_named in (False, True))
    status, output = 0, ""
    for chosen in ([*files, "-m", "not long"] if files else [], named):
        if not chosen or status != 0:
            continue
        try:
            done = subprocess.run(
                [*argv, *chosen], cwd=folder, env=environment, capture_output=True, text=True, timeout=patience_s
            )
        except subprocess.TimeoutExpired:
            return -1, f"{output}not done in {patience_s:.0f} s"
        status, output = done.returncode, output + done.stdout + done.stderr
    return status, output


def judge(mutant: Mutant) -> tuple[str, float]:
    """The test that failed ("" where none did), and the seconds that it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_repository(Path(name))
        plant(mutant, folder)
        status, output = run_tests(folder, mutant.tests.split())
    failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    # A copy that can't even be imported proves nothing about the tests.
    caught = failed.group(1) if status == 1 and failed else ""
    return caught, time.monotonic() - began


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="this mistake alone (may be repeated)")
    parser.add_argument("--list", action="store_true", help="name the mistakes and end")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default: 1)")
    args = parser.parse_args()
    console = Console(width=120 if not sys.stdout.isatty() else None)

    chosen = [m for m in MUTANTS if args.only is None or m.name in args.only]
    if unknown := set(args.only or ()) - {m.name for m in MUTANTS}:
        parser.error(f"no such mistake: {', '.join(sorted(unknown))}")
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name:20} {mutant.what}")
        return 0

    tests = list(dict.fromkeys(test for m in chosen for test in m.tests.split()))
    with tempfile.TemporaryDirectory() as name:
        console.print(f"{len(tests)} groups of tests without any mistake first")
        status, output = run_tests(copy_of_repository(Path(name)), tests, patience_s=6 * PATIENCE_S)
    if status != 0:
        print(output, file=sys.stderr)
        print("the tests fail as they are: nothing can be said about mistakes", file=sys.stderr)
        return 1

    verdicts: list[tuple[str, float]] = []
    with Progress(console=console, transient=True) as progress, ThreadPoolExecutor(args.jobs) as pool:
        task = progress.add_task("mistakes", total=len(chosen))
        for mutant, verdict in zip(chosen, pool.map(judge, chosen), strict=True):
            verdicts.append(verdict)
            progress.console.print(f"{mutant.name:20} {verdict[0] or 'SURVIVED'}", soft_wrap=True, highlight=False)
            progress.advance(task)

    table = Table("mistake", "what", "caught by", "s")
    for mutant, (caught, seconds) in zip(chosen, verdicts, strict=True):
        table.add_row(mutant.name, mutant.what, caught.split("::", 1)[-1] or "[red]none[/]", f"{seconds:.0f}")
    console.print(table)
    survived = [m.name for m, (caught, _) in zip(chosen, verdicts, strict=True) if not caught]
    total = sum(seconds for _, seconds in verdicts)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught in {total:.0f} s; survived: {survived or 'none'}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
