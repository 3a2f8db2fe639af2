"""What a training job reads."""

from dataclasses import replace

import numpy as np
import pytest

from dpar_core.data.images import CENTER_VIEWS, VIEW_COUNTS
from dpar_core.data.shards import TokenMeta, TokenSample, TokenShards, write_index, write_shard
from dpar_core.models.gpt import GPTConfig
from dpar_core.models.memory import TRAINING_SHARE, training_memory
from dpar_core.training.parallel import Ranks
from stages.shared.jobs import TrainData, TrainJob, memory_line
from tests.helpers.tiny_shards import CODES, GRID, tiny_params, write_tokens


def test_a_micro_batch_that_is_estimated_not_to_fit_is_announced_with_the_way_out(tmp_path):
    tokens = write_tokens(tmp_path / "tokens")
    training = tiny_params().train.model_copy(update={"batch_size": 8, "accumulate": 1, "precision": "fp32"})
    job = TrainJob("llamagen", GPTConfig(CODES, GRID, 32, 2, 1, num_classes=2), training, 0, tokens)
    estimate = training_memory(job.config, None, bf16=False)
    data = TrainData(job, Ranks())
    assert memory_line(job, data, 1.01 * estimate.total(8) / TRAINING_SHARE) is None
    line = memory_line(job, data, estimate.total(5) / TRAINING_SHARE)
    assert "training 8 images at a time" in line and "raise `accumulate` to 2" in line
    assert "strategy: fsdp" in memory_line(job, data, estimate.total(0))


def test_workers_refuse_other_tokens_than_their_job_was_named_by(tmp_path):
    tokens = write_tokens(tmp_path / "tokens")
    config = GPTConfig(CODES, GRID, 32, 2, 1, num_classes=2)
    job = TrainJob("llamagen", config, tiny_params().train, 0, tokens, read={"tokens": TokenShards(tokens, "train").digest})
    TrainData(job, Ranks())
    with pytest.raises(ValueError, match=r"tokens in .* changed while training began"):
        TrainData(replace(job, read={"tokens": "0" * 16, "tokenizer": "1"}), Ranks())


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("images", [5, 13])
def test_workers_validate_every_image_once_in_equally_many_batches(tmp_path, workers, images):
    tokens = write_tokens(tmp_path / "tokens", validation=13)
    training = tiny_params().train.model_copy(update={"batch_size": 12, "accumulate": 2, "validation_images": images})
    job = TrainJob("llamagen", GPTConfig(CODES, GRID, 32, 2, 1, num_classes=2), training, 0, tokens)
    parts = [list(TrainData(job, Ranks(rank, workers)).validation()) for rank in range(workers)]
    assert len({len(part) for part in parts}) == 1
    batches = [(batch, weight) for part in parts for batch, weight in part]
    assert sum(weight for _, weight in batches) == images
    assert all(weight in (len(batch.tokens), 0) for batch, weight in batches)
    seen = np.concatenate([batch.tokens.numpy() for batch, weight in batches if weight])
    shards = TokenShards(tokens, "validation")
    chosen = [number * 13 // images for number in range(images)]
    expected = shards.tokens(np.array(chosen), np.full(images, CENTER_VIEWS[shards.meta.views]))
    assert sorted(map(tuple, seen)) == sorted(map(tuple, expected))


@pytest.mark.parametrize("name", VIEW_COUNTS)
def test_validation_sees_the_centre_crop_of_every_view_set(tmp_path, name):
    count = VIEW_COUNTS[name]
    tokens = np.repeat(np.arange(count, dtype=np.uint16)[:, None], 4, axis=1)  # every token is the number of its view
    shards = []
    for split in ("train", "validation"):
        samples = [TokenSample(f"{split}-{number}", 0, tokens, {}) for number in range(8)]
        write_shard(tmp_path / f"{split}-000000.tar", samples)
        shards.append((f"{split}-000000.tar", split))
    meta = TokenMeta(2, 32, name, count, 8, ("one",), "t" * 16, "m" * 16)
    write_index(tmp_path, meta, shards)
    job = TrainJob("entropy_model", GPTConfig(32, 2, 32, 2, 1), tiny_params().entropy_model.train, 0, tmp_path)
    seen = np.concatenate([batch.tokens.numpy() for batch, _ in TrainData(job, Ranks()).validation()])
    assert len(seen) and (seen == CENTER_VIEWS[name]).all()
