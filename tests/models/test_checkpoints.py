import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cm_train.core import files
from cm_train.core.errors import InputError
from cm_train.models.backbones.unet import UNetConfig
from cm_train.models.checkpoints import find, verify
from cm_train.models.checkpoints import load as loading
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints import write as saving
from cm_train.models.checkpoints.manifest import DamagedCheckpoint, signed
from cm_train.models.denoiser import DenoiserConfig, build_denoiser

SIZES = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": []}
BACKBONE = UNetConfig(**SIZES, head_channels=8, group_channels=4)
CONFIG = DenoiserConfig(
    kind="consistency",
    boundary="sigma_min",
    image_size=8,
    image_channels=1,
    sigma_data=0.5,
    sigma_min=0.002,
    sigma_max=80.0,
    sampling={"points": {2: [80.0, 0.8]}},
)


def network(seed):
    torch.manual_seed(seed)
    denoiser = build_denoiser(CONFIG, BACKBONE)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p)
    return denoiser


def write(run, step, seed=0, **state):
    folder = checkpoint.step_folder(run, step)
    weights = {"denoiser": network(seed), "ema_0.9": network(seed + 1), "ema_0.99": network(seed + 2)}
    saving.write(
        folder,
        {stem: module.state_dict() for stem, module in weights.items()},
        state or {"step": torch.tensor(step)},
        step=step,
        finished=False,
        ema="ema_0.9",
        denoiser=CONFIG,
        backbone=BACKBONE,
        provenance={},
    )
    return folder


@pytest.mark.parametrize(("weights", "seed"), [("raw", 0), ("ema", 1), ("ema_0.9", 1), ("ema_0.99", 2)])
def test_load_denoiser_gives_the_named_weights_back(weights, seed, tmp_path):
    write(tmp_path, 5)
    loaded = loading.load_denoiser(tmp_path, weights)
    expected = network(seed)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    assert torch.equal(loaded(x, sigma), expected(x, sigma))
    assert loaded.config == CONFIG
    assert not any(p.requires_grad for p in loaded.parameters())


def test_unknown_weights_are_refused_with_all_that_there_are(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(InputError, match="no such weights; got 'ema_0.5'; allowed: ema, raw, ema_0.9, ema_0.99$"):
        loading.load_denoiser(tmp_path, "ema_0.5")
    with pytest.raises(
        InputError, match="no snapshots to make an average of.*allowed: ema, raw, ema_0.9, ema_0.99; fix"
    ):
        loading.load_denoiser(tmp_path, "power_0.1")


def test_load_denoiser_takes_a_run_or_one_of_its_checkpoints(tmp_path):
    older, newer = write(tmp_path, 5, seed=10), write(tmp_path, 15, seed=20)
    pick = lambda path: next(loading.load_denoiser(path, "raw").parameters())  # noqa: E731
    assert torch.equal(pick(tmp_path), next(network(20).parameters()))
    assert torch.equal(pick(newer), next(network(20).parameters()))
    assert torch.equal(pick(older), next(network(10).parameters()))


def test_state_comes_back_and_refuses_code(tmp_path):
    folder = write(tmp_path, 1, values=torch.arange(3), text="x", nested={"a": 1.5})
    state = checkpoint.read_state(folder)
    assert torch.equal(state["values"], torch.arange(3))
    assert state["nested"] == {"a": 1.5}

    class Evil:
        def __reduce__(self):
            return os.system, ("touch owned",)

    torch.save({"x": Evil()}, folder / "state.pt")
    with pytest.raises(DamagedCheckpoint, match="can't be read"):
        checkpoint.read_state(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["denoiser.safetensors", "ema_0.99.safetensors", "state.pt"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "delete"])
def test_verify_finds_every_harmed_file_used_or_not(name, harm, tmp_path):
    folder = write(tmp_path, 1)
    file = folder / name
    content = file.read_bytes()
    if harm == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.unlink()
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoint.verify(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "can't be read"),
        ("[1, 2]", "not an object"),
        ("{" * 100_000, "can't be read"),
        ('{"format": 1}', "does not match its own sha256"),
        (signed({"format": 1}), "is missing"),
        (signed({"format": 99}), "another format"),
    ],
)
def test_verify_refuses_a_broken_manifest(text, message, tmp_path):
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
        checkpoint.verify(folder)


def edited(folder, edit):
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(signed(values))


@pytest.mark.parametrize(
    ("word", "kind", "boundary"),
    [
        ("edm", "diffusion", "zero"),
        ("consistency", "consistency", "sigma_min"),
        ("trigflow", "consistency", "zero"),
    ],
)
def test_manifest_of_format_1_is_read_as_this_version_would_write_it(word, kind, boundary, tmp_path):
    """One word, `preconditioning`, said what kind of model it is and where its boundary lies."""

    def as_before(values):
        values["format"] = 1
        del values["denoiser"]["kind"], values["denoiser"]["boundary"]
        values["denoiser"]["preconditioning"] = word

    folder = write(tmp_path, 1)
    edited(folder, as_before)
    manifest = checkpoint.verify(folder)
    assert manifest.denoiser == CONFIG.model_copy(update={"kind": kind, "boundary": boundary})
    assert manifest.format == 2
    assert loading.load_denoiser(tmp_path).config == manifest.denoiser


@pytest.mark.parametrize("word", ["vp", 3, ["edm"], None])
def test_manifest_of_format_1_with_an_unknown_word_is_damaged(word, tmp_path):
    folder = write(tmp_path, 1)
    edited(folder, lambda values: values.update(format=1, denoiser=values["denoiser"] | {"preconditioning": word}))
    with pytest.raises(DamagedCheckpoint, match="unknown key manifest.json.denoiser.preconditioning"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("seed", range(40))
def test_a_bit_flipped_in_the_manifest_never_goes_unseen(seed, tmp_path):
    """A digit of the step, a noise level, a provenance: all of it is valid JSON that means another run."""
    write(tmp_path, 10)
    manifest = write(tmp_path, 20) / "manifest.json"
    content = bytearray(manifest.read_bytes())
    content[seed * 7919 % len(content)] ^= 1 << seed % 7
    manifest.write_bytes(content)
    assert checkpoint.latest(tmp_path)[1].step == 10


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 20).rename(checkpoint.step_folder(tmp_path, 30))
    assert checkpoint.latest(tmp_path)[1].step == 10


def test_verify_refuses_names_outside_the_folder(tmp_path):
    folder = write(tmp_path, 1)
    edited(folder, lambda m: m["files"].update({"../../secret": m["files"]["state.pt"]}))
    with pytest.raises(DamagedCheckpoint, match="outside the folder"):
        checkpoint.verify(folder)


def test_verify_refuses_a_hostile_safetensors_header_that_nobody_listed(tmp_path):
    folder = write(tmp_path, 1)
    (folder / "unused.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(DamagedCheckpoint, match="unused.safetensors"):
        checkpoint.verify(folder)


def test_class_names_come_back_and_a_manifest_without_them_is_read(tmp_path):
    folder = write(tmp_path, 1)
    edited(folder, lambda m: m["denoiser"].pop("class_names"))
    assert checkpoint.verify(folder).denoiser.class_names == []
    edited(folder, lambda m: m["denoiser"].update(num_classes=2, class_names=["a", "b"]))
    assert checkpoint.verify(folder).denoiser.class_names == ["a", "b"]
    for names in (["a"], ["a", "x" * 256]):
        edited(folder, lambda m, names=names: m["denoiser"].update(class_names=names))
        with pytest.raises(DamagedCheckpoint, match="class_names"):
            checkpoint.verify(folder)


def test_manifest_chooses_components_only(tmp_path):
    folder = write(tmp_path, 1)
    edited(folder, lambda m: m["backbone"].update({"name": "os.system"}))
    with pytest.raises(InputError, match="a part that is not known here: backbone 'os.system'"):
        loading.load_denoiser(folder)


def test_weights_that_do_not_fit_name_the_first_mismatch(tmp_path):
    folder = write(tmp_path, 1)
    edited(folder, lambda m: m["backbone"].update({"channels": 16}))
    with pytest.raises(InputError, match=r"backbone\.embed_in\.weight.*\[32, 8\].*\[64, 16\]"):
        loading.load_denoiser(folder)


def test_unknown_weights_list_those_there_are(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(InputError, match=r"ema_0.5.*allowed: ema, raw, ema_0.9, ema_0.99"):
        loading.load_denoiser(tmp_path, "ema_0.5")


def test_latest_passes_over_a_damaged_newest_and_sets_it_aside(tmp_path, capsys):
    for _ in range(2):  # the same step damaged twice must not trip over the first one set aside
        good, bad = write(tmp_path, 5), write(tmp_path, 10)
        (bad / "state.pt").write_bytes(b"torn")
        assert checkpoint.latest(tmp_path)[0] == good
        assert "step_00000010 is damaged" in capsys.readouterr().err
        assert checkpoint.latest(tmp_path, set_aside=True)[0] == good
        assert not bad.exists()
    aside = sorted(p.name for p in bad.parent.glob("damaged_*"))
    assert aside == ["damaged_step_00000010", "damaged_step_00000010_2"]


def test_latest_raises_where_all_are_damaged_every_time(tmp_path):
    """A second try must not find an empty run and start from zero."""
    assert checkpoint.latest(tmp_path) is None
    (write(tmp_path, 5) / "state.pt").unlink()
    for _ in range(2):
        with pytest.raises(DamagedCheckpoint, match="step_00000005"):
            checkpoint.latest(tmp_path, set_aside=True)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run, limit = Path(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    test_checkpoints.write(run, 10, big=test_checkpoints.torch.zeros(100_000))
except OSError as error:
    print("OSError", error.strerror)
"""


@pytest.mark.parametrize("limit", [20_000, 200_000], ids=["weights", "state"])
def test_a_full_disk_is_an_oserror_and_leaves_the_older_checkpoint_alone(limit, tmp_path):
    """A limit on file size makes the real writers fail, in safetensors and in torch.save."""
    write(tmp_path, 5)
    argv = [sys.executable, "-c", FULL_DISK, str(Path(__file__).parent), str(tmp_path), str(limit)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout.startswith("OSError"), done.stderr
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    assert checkpoint.latest(tmp_path)[1].step == 5


def test_a_half_written_checkpoint_is_never_seen(tmp_path):
    write(tmp_path, 5)
    half = tmp_path / "checkpoints" / ".step_00000010.writing"
    half.mkdir()
    (half / "denoiser.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path)[1].step == 5
    write(tmp_path, 10)
    assert checkpoint.latest(tmp_path)[1].step == 10
    assert not half.exists()


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    saving.prune(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000010"]


def test_steps_sort_by_number(tmp_path):
    """step_100000000 has a digit more than the names of eight that come before it."""
    for step in (99_999_999, 100_000_000, 5):
        write(tmp_path, step)
    assert [int(folder.name[5:]) for folder in checkpoint.folders(tmp_path)] == [100_000_000, 99_999_999, 5]
    assert checkpoint.latest(tmp_path)[1].step == 100_000_000
    saving.prune(tmp_path, 1)
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["step_100000000"]


def test_every_file_is_readable_by_whom_the_umask_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in checkpoint.step_folder(tmp_path, 1).iterdir()}
    assert len(modes) >= 4
    assert set(modes.values()) == {0o640}, modes


def test_a_checkpoint_that_may_not_be_read_is_not_a_damaged_one(tmp_path, monkeypatch):
    """A colleague's: setting it aside, or going on from an older one, would be wrong."""
    for step in (1, 2):
        write(tmp_path, step)

    def denied(path, size):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verify, "_size_and_sha256", denied)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    with pytest.raises(InputError, match="may not be read by this user") as refused:
        checkpoint.latest(tmp_path, set_aside=True)
    assert not isinstance(refused.value, DamagedCheckpoint)
    assert len(checkpoint.folders(tmp_path)) == 2


def test_resolve_says_what_is_there(tmp_path):
    write(tmp_path / "digits-cd", 1)
    with pytest.raises(InputError, match=r"no checkpoint there.*digits-cx.*one of digits-cd"):
        find.resolve(tmp_path / "digits-cx")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="has no checkpoint yet"):
        find.resolve(tmp_path / "empty")
