"""Predicted masks: of a batch, and of a data set as a bank. And the network's file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relicctl.bgmask.images import iter_resized_batches, load_resized_images, resize_to_square
from relicctl.bgmask.network import SaliencyNet, load_saliency_net, save_saliency_net
from relicctl.bgmask.predict import MaskSource, SaliencyPredictor, write_mask_bank
from relicctl.bgmask.priors.maps import build_prior_channels, compute_prior_maps, quantize_maps
from relicctl.config.bgmask import PredictConfig, RefineConfig
from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError, BadImages
from relicctl.data.mask_bank import MASK_SIDE, MaskBank, MaskBankWriter
from relicctl.errors import DataError, UsageError
from relicctl.models.resnet import build_encoder

CPU = torch.device("cpu")
PLAIN = PredictConfig(flip=False, refine="none", batch_size=4)


def small_net(arch="resnet", hints=0):
    with fork_seeded_rng(0):
        encoder = build_encoder("resnet18", 0.125) if arch == "resnet" else None
        return SaliencyNet(arch, 32, encoder, hints).eval()


class Redness(torch.nn.Module):
    """A network that takes what is red for the object."""

    size, hints = 32, 0

    def forward(self, x):
        return [4 * (x[:, :1] - x[:, 1:2]), torch.zeros_like(x[:, :1])]


class Drawn(ImageDataset):
    """Images of many shapes with a red half on the left; some cannot be decoded. Reading is counted."""

    spec = "drawn"
    shapes = ((40, 60), (1, 500), (700, 40), (128, 128), (33, 21))

    def __init__(self, count=13, bad=()):
        self.count, self.bad, self.read_so_far = count, frozenset(bad), []

    def __len__(self):
        return self.count

    def get_name(self, index):
        return f"{index:03d}.png"

    def read(self, index):
        self.read_so_far.append(index)
        if index in self.bad:
            raise BadImageError("drawn badly")
        height, width = self.shapes[index % len(self.shapes)]
        image = np.full((height, width, 3), 60 + index, np.uint8)
        image[:, : -(-width // 2), 0] = 250
        return image


def images(count=3, side=48):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def masks_of(net, pixels, options=PLAIN, given=None):
    return SaliencyPredictor(net, options, RefineConfig(), CPU).predict(pixels, given)


# Prediction


@pytest.mark.parametrize("side", [32, 48, 128])
@pytest.mark.parametrize("refine", ["none", "guided", "cut"])
def test_maps_are_probabilities_at_the_images_own_side(side, refine):
    found = masks_of(small_net(), images(2, side), PredictConfig(refine=refine, scales=(0.5, 1.0, 1.5)))
    assert found.shape == (2, side, side)
    assert found.dtype == torch.float32
    assert bool(((found >= 0) & (found <= 1)).all())


def test_a_map_does_not_depend_on_the_rest_of_the_batch():
    net, pixels = small_net(), images(5)
    together = masks_of(net, pixels)
    alone = torch.cat([masks_of(net, pixels[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_with_flips_a_mirrored_image_has_the_mirrored_map():
    net, pixels, both = small_net(), images(), PredictConfig(flip=True, refine="none")
    torch.testing.assert_close(masks_of(net, pixels.flip(-1), both), masks_of(net, pixels, both).flip(-1))
    assert not torch.allclose(masks_of(net, pixels.flip(-1)), masks_of(net, pixels).flip(-1))


def test_several_scales_are_averaged():
    net, pixels = small_net(), images()
    one, two = (masks_of(net, pixels, PredictConfig(flip=False, refine="none", scales=(s,))) for s in (1.0, 2.0))
    both = masks_of(net, pixels, PredictConfig(flip=False, refine="none", scales=(1.0, 2.0)))
    torch.testing.assert_close(both, (one + two) / 2)


def test_prediction_leaves_the_networks_statistics_alone():
    net = small_net().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    masks_of(net, images())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


# The bank


def bank_of(source, path, workers=0, net=None):
    """Write a bank; return how many masks there were after each batch, and the bad images."""
    done, bad = [], []
    predictor = SaliencyPredictor(net or Redness(), PLAIN, RefineConfig(), CPU)
    with MaskBankWriter(path, source, made_by="test") as writer:
        write_mask_bank(
            predictor,
            MaskSource(source, workers, prior_size=24),
            writer,
            show=done.append,
            on_bad_image=lambda name, reason: bad.append((name, reason)),
        )
    return done, bad


def test_every_sample_gets_the_mask_of_its_own_image(tmp_path):
    source = Drawn()
    done, bad = bank_of(source, tmp_path / "masks.bank")
    bank = MaskBank.open(tmp_path / "masks.bank")
    for row in bank.find_rows(source):
        mask = bank.load_mask(int(row))
        assert mask[:, : MASK_SIDE // 2 - 8].all()
        assert not mask[:, MASK_SIDE // 2 + 8 :].any()
    assert done == [4, 8, 12, 13]
    assert bad == []


def test_the_bank_is_the_same_for_any_number_of_workers(tmp_path):
    source = Drawn(bad=(2, 7))
    for workers in (0, 2):
        bank_of(source, tmp_path / f"{workers}.bank", workers, small_net())
    assert (tmp_path / "0.bank").read_bytes() == (tmp_path / "2.bank").read_bytes()


def test_a_network_with_prior_channels_gets_the_priors_of_each_image(tmp_path):
    """Whatever the number of workers, and beside images that cannot be decoded, or have nothing to go by."""
    source, net = Drawn(count=7, bad=(2,)), small_net(hints=4)
    for workers in (0, 2):
        done, bad = bank_of(source, tmp_path / f"{workers}.bank", workers, net)
        assert (done, len(bad)) == ([4, 7], 1)
    assert (tmp_path / "0.bank").read_bytes() == (tmp_path / "2.bank").read_bytes()
    bank = MaskBank.open(tmp_path / "0.bank")
    for index, row in enumerate(bank.find_rows(source)):
        if index not in source.bad:
            image = source.load(index)
            pixels = torch.from_numpy(resize_to_square(image, MASK_SIDE)).permute(2, 0, 1)[None]
            given = build_prior_channels(*(array[None] for array in quantize_maps(compute_prior_maps(image, 24))))
            assert np.array_equal(bank.load_mask(int(row)), (masks_of(net, pixels, given=given)[0] > 0.5).numpy())


def test_an_undecodable_image_gets_an_empty_mask_and_is_reported(tmp_path):
    source = Drawn(bad=range(4, 9))  # a whole batch among them
    done, bad = bank_of(source, tmp_path / "masks.bank")
    assert bad == [(f"{index:03d}.png", "drawn badly") for index in range(4, 9)]
    assert done[-1] == 13
    bank = MaskBank.open(tmp_path / "masks.bank")
    filled = [bool(bank.load_mask(int(row)).any()) for row in bank.find_rows(source)]
    assert filled == 4 * [True] + 5 * [False] + 4 * [True]


def test_masks_that_are_written_are_not_computed_again(tmp_path):
    path, source = tmp_path / "masks.bank", Drawn()

    def cut_short(done):
        if done >= 8:
            raise KeyboardInterrupt

    predictor = SaliencyPredictor(Redness(), PLAIN, RefineConfig(), CPU)
    with pytest.raises(KeyboardInterrupt), MaskBankWriter(path, source, made_by="test") as writer:
        write_mask_bank(predictor, MaskSource(source), writer, show=cut_short)
    source.read_so_far.clear()
    done, _ = bank_of(source, path)
    assert sorted(source.read_so_far) == list(range(8, 13))
    assert done == [12, 13]


# Photos


def test_resizing_keeps_the_whole_image():
    image = np.zeros((30, 90, 3), np.uint8)
    image[:, 45:] = 255
    small = resize_to_square(image, 16)
    assert small.shape == (16, 16, 3)
    assert small[:, :7].max() < 30
    assert small[:, 9:].min() > 225


@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (1, 1), (2, 20_000)])
def test_images_of_any_shape_can_be_resized(shape):
    assert bool((resize_to_square(np.full((*shape, 3), 93, np.uint8), 32) == 93).all())


def test_undecodable_images_are_left_out():
    source, done = Drawn(bad=(0, 5)), []
    bad = BadImages(13, 0.5)
    photos = load_resized_images(source, 24, workers=2, bad=bad, show=done.append)
    assert photos.indices.tolist() == [k for k in range(13) if k not in (0, 5)]
    assert done[-1] == 13
    assert bad.seen == {"000.png", "005.png"}
    for index, image in zip(photos.indices.tolist(), photos.images, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), resize_to_square(source.load(index), 24))


def test_no_decodable_image_is_an_error():
    with pytest.raises(DataError, match="None of the 3 images"):
        load_resized_images(Drawn(3, bad=range(3)), 16, workers=0, bad=BadImages(3, 1.0))


def test_no_indices_give_no_batches():
    assert list(iter_resized_batches(Drawn(), np.empty(0, np.int64), 16, batch_size=4, workers=2)) == []


# The file


@pytest.mark.parametrize("hints", [0, 4])
@pytest.mark.parametrize("arch", ["u2netp", "resnet"])
def test_save_load_restores_the_network(arch, hints, tmp_path):
    net = small_net(arch, hints)
    save_saliency_net(tmp_path / "saliency.safetensors", net)
    again = load_saliency_net(tmp_path)
    assert (again.arch, again.size, again.hints, again.training) == (arch, 32, hints, False)
    assert again.metadata == net.metadata
    given = images(side=24)[:, [0, 1, 2, 0]] if hints else None
    assert torch.equal(masks_of(again, images(), given=given), masks_of(net, images(), given=given))


def test_files_that_are_no_mask_network_are_refused(tmp_path):
    path = tmp_path / "saliency.safetensors"
    with pytest.raises(UsageError, match="no mask network at"):
        load_saliency_net(tmp_path)
    save_saliency_net(path, small_net())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="truncated or damaged"):
        load_saliency_net(path)
    from relicctl.encoders.file import save_encoder

    save_encoder(path, build_encoder("resnet18", 0.125), {})
    with pytest.raises(UsageError, match="holds no mask network"):
        load_saliency_net(path)
