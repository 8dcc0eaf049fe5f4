import dataclasses

from flax import nnx

from zamba2_jax import Zamba2, Zamba2Config
from zamba2_jax.cli.demo import INIT_SCALE, optimizer
from zamba2_jax.evaluate import necessity
from zamba2_jax.text.vocabulary import train_tokenizer
from zamba2_jax.train.data import held_out
from zamba2_jax.train.loop import make_stages, train
from zamba2_jax.train.patterns import scale_matrices
from zamba2_jax.train.schedule import Phase, learning_rate
from zamba2_jax.train.step import compile_train_step, init_state
from zamba2_jax.train.synthetic import Copying, open_synthetic

VOCABULARY, LENGTH, STEPS = 270, 48, 220
CONFIG = dataclasses.replace(
    Zamba2Config.preset("zamba2-nano"),
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_layers=2,
    hybrid_layer_ids=(1,),
    num_shared_blocks=1,
    d_state=8,
    ffn_size=96,
    adapter_rank=4,
)


def test_a_small_hybrid_learns_to_copy_and_needs_attention_and_mixers_for_it():
    tokenizer = train_tokenizer(["the cat and the hat and the bat " * 3], VOCABULARY)
    task = Copying(symbols=24, lengths=(2, 20), distinct=True)
    source = open_synthetic(task, tokenizer, vocab_size=VOCABULARY)
    phase = Phase(name="copying", steps=STEPS, shares={"copying": 1.0}, warmup_steps=10, decay="linear")
    stages = make_stages([phase], {"copying": source}, batch_size=8, length=LENGTH, seed=0)
    muon, schedule = optimizer().transformation(), learning_rate([phase], 1.5e-2)
    state = init_state(scale_matrices(Zamba2(CONFIG, rngs=nnx.Rngs(0)), INIT_SCALE), muon)
    step = compile_train_step(state, next(iter(stages[0].batches)), optimizer=muon, schedule=schedule)
    state = train(state, step, stages, held_out={}, log_every=STEPS, eval_every=STEPS, report=lambda record: None)

    long = open_synthetic(dataclasses.replace(task, lengths=(12, 20)), tokenizer, vocab_size=VOCABULARY)
    select = ["all.attention", "hybrid.mixer", "plain.mixer"]
    found = necessity(state.model, held_out(long, batch_size=32, length=LENGTH), select=select)
    assert found.accuracy > 0.9  # a guess is right one time in 24
    for part in select:
        assert found[part].accuracy < 0.3, part
        assert found[part].increase > 1, part
