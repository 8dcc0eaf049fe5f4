from notebooks.trained import LENGTH, copying_task, train_copying_model
from zamba2_jax.data.batches import held_out
from zamba2_jax.evaluate import necessity


def test_a_small_hybrid_learns_to_copy_and_needs_attention_and_mixers_for_it():
    model, tokenizer = train_copying_model()
    long = copying_task(tokenizer, lengths=(12, 20))
    select = ["all.attention", "hybrid.mixer", "plain.mixer"]
    found = necessity(model, held_out(long, batch_size=32, length=LENGTH), select=select)
    assert found.accuracy > 0.9  # a guess is right one time in 24
    for part in select:
        assert found[part].accuracy < 0.3, part
        assert found[part].increase > 1, part
