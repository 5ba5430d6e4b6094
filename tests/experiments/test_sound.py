"""Features of sound: against Kaldi, the equations in float64, and bad input."""

from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import savgol_filter

from attn_jax import inputs
from experiments.data import sound

# Two settings of everything that Kaldi has too; `high` None is half the sample rate.
SETTINGS = {
    "wide": {},
    "telephone": {
        "sample_rate": 8000,
        "window_ms": 20.0,
        "hop_ms": 7.5,
        "num_mels": 23,
        "low": 64.0,
        "high": 3800.0,
        "preemphasis": 0.9,
        "window_type": "hamming",
    },
}
CEPSTRUM = {"use_energy": True, "lifter": 0.0, "num_ceps": 23}


def _sound(sample_rate: int, seconds: float = 0.2) -> np.ndarray:
    """A chirp from 100 Hz up, noise and an offset, in int16; an odd number of it."""
    time = np.arange(int(sample_rate * seconds) | 1) / sample_rate
    sweep = np.sin(2 * np.pi * (100 * time + 0.2 * sample_rate / seconds * time**2))
    noise = np.random.default_rng(0).standard_normal(len(time))
    return np.round(32_767 * (0.3 * sweep + 0.02 * noise + 0.05)).astype(np.int16)


@pytest.fixture(scope="module")
def kaldi() -> ModuleType:
    return pytest.importorskip("kaldi_native_fbank")


def _kaldi_features(kaldi, kind, signal, options, **more):
    """Features of int16 samples by kaldi-native-fbank, with our names of options."""
    given = {"num_mels": 40, "window_type": "povey", "high": None, **options, **more}
    opts = kaldi.FbankOptions() if kind == "log_mel" else kaldi.MfccOptions()
    frame, mel = opts.frame_opts, opts.mel_opts
    frame.dither = 0.0
    frame.samp_freq = given.get("sample_rate", 16_000)
    frame.frame_length_ms = given.get("window_ms", 25.0)
    frame.frame_shift_ms = given.get("hop_ms", 10.0)
    frame.preemph_coeff = given.get("preemphasis", 0.97)
    frame.window_type = {"hann": "hanning"}.get(
        given["window_type"], given["window_type"]
    )
    mel.num_bins = given["num_mels"]
    mel.low_freq = given.get("low", 20.0)
    mel.high_freq = given["high"] or 0.0
    opts.use_energy = given.get("use_energy", False)
    if kind == "mfcc":
        opts.num_ceps = given.get("num_ceps", 13)
        opts.cepstral_lifter = given.get("lifter", 22.0)
    online = kaldi.OnlineFbank if kind == "log_mel" else kaldi.OnlineMfcc
    extractor = online(opts)
    extractor.accept_waveform(frame.samp_freq, signal.astype(float).tolist())
    extractor.input_finished()
    return np.stack([extractor.get_frame(t) for t in range(extractor.num_frames_ready)])


def _log_mel_loops(signal, window, hop, fft_size, filters, preemphasis, taper):
    """The equation of `log_mel` in float64, frame by frame, the DFT a matrix."""
    out = []
    i = np.arange(fft_size)
    dft = np.exp(-2j * np.pi * i[:, None] * i[None, : fft_size // 2 + 1] / fft_size)
    for start in range(0, len(signal) - window + 1, hop):
        y = signal[start : start + window].astype(np.float64)
        y = y - y.mean()
        z = np.zeros(fft_size)
        for j in range(window):
            z[j] = (y[j] - preemphasis * y[max(j - 1, 0)]) * taper[j]
        out.append(np.log(np.maximum(filters @ np.abs(z @ dft) ** 2, 2.0**-23)))
    return np.array(out)


def _filters_loops(num_mels, fft_size, sample_rate, low, high):
    """Triangles between three points on the mel scale, in float64."""

    def mel(frequency):
        return 1127.0 * np.log(1.0 + frequency / 700.0)

    points = np.linspace(mel(low), mel(high), num_mels + 2)
    filters = np.zeros((num_mels, fft_size // 2 + 1))
    for m in range(num_mels):
        left, centre, right = points[m : m + 3]
        for i in range(fft_size // 2 + 1):
            x = mel(i * sample_rate / fft_size)
            if left < x <= centre:
                filters[m, i] = (x - left) / (centre - left)
            elif centre < x < right:
                filters[m, i] = (right - x) / (right - centre)
    return filters


def test_sizes_in_samples():
    assert sound.frame_sizes() == (400, 160)
    assert sound.frame_sizes(22_050) == (551, 220)
    # Whole samples stay whole, whatever the division leaves in binary.
    for samples in range(2, 500):
        for rate in (11_025, 22_050, 44_100):
            ms = 1000 * samples / rate
            assert sound.frame_sizes(rate, ms, ms) == (samples, samples)


# Spectra.


def test_mel_filters_are_triangles_that_add_up_to_one():
    filters = np.asarray(sound.mel_filters(12, 128, 8000, 100.0, 3500.0))
    assert filters.dtype == np.float32
    np.testing.assert_allclose(
        filters, _filters_loops(12, 128, 8000, 100.0, 3500.0), atol=1e-6
    )
    peaks = filters.argmax(axis=1)
    inner = filters[:, peaks[0] + 1 : peaks[-1]]
    np.testing.assert_allclose(inner.sum(axis=0), 1.0, atol=1e-6)
    default = sound.mel_filters(12, 128, 8000)
    np.testing.assert_array_equal(
        default, sound.mel_filters(12, 128, 8000, 20.0, 4000.0)
    )
    assert not default[:, -1].any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_log_mel_is_that_of_kaldi(kaldi, setting):
    options = SETTINGS[setting]
    signal = _sound(options.get("sample_rate", 16_000))
    reference = _kaldi_features(kaldi, "log_mel", signal, options)
    ours = sound.log_mel(signal, **options)
    assert ours.dtype == jnp.float32
    assert ours.shape == reference.shape
    # Kaldi's filters are rounded to float32 on the way; ours are not.
    np.testing.assert_allclose(ours, reference, atol=5e-4, rtol=0)


@pytest.mark.parametrize("window_type", ["hann", "rectangular"])
def test_other_tapers_are_those_of_kaldi(kaldi, window_type):
    options = SETTINGS["telephone"] | {"window_type": window_type}
    reference = _kaldi_features(kaldi, "log_mel", _sound(8000), options)
    ours = sound.log_mel(_sound(8000), **options)
    np.testing.assert_allclose(ours, reference, atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("setting", "more"),
    [
        ("wide", {"num_mels": 23}),
        ("telephone", CEPSTRUM),
    ],
)
def test_mfcc_is_that_of_kaldi(kaldi, setting, more):
    options = SETTINGS[setting]
    signal = _sound(options.get("sample_rate", 16_000))
    reference = _kaldi_features(kaldi, "mfcc", signal, options, **more)
    ours = sound.mfcc(signal, **options | more)
    assert ours.shape == reference.shape
    # The lifter makes the high coefficients, and their errors, up to 12 times larger.
    np.testing.assert_allclose(ours, reference, atol=1.5e-3, rtol=0)


def test_log_mel_and_its_gradient_are_the_equation(draw):
    """Closer to float64 than Kaldi is, and a slope that is measured."""
    window, hop, fft_size = 128, 60, 128  # A power of two stays as it is.
    options = {"sample_rate": 8000, "window_ms": 16.0, "hop_ms": 7.5, "num_mels": 12}
    signal = _sound(8000, 0.05) / 32_768
    reference = functools.partial(
        _log_mel_loops,
        window=window,
        hop=hop,
        fft_size=fft_size,
        filters=_filters_loops(12, fft_size, 8000, 20.0, 4000.0),
        preemphasis=0.97,
        taper=(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / 127)) ** 0.85,
    )
    log_mel = functools.partial(sound.log_mel, **options)
    expected = reference(32_768 * signal)
    np.testing.assert_allclose(log_mel(signal), expected, atol=5e-5, rtol=0)
    drawn = draw({"cotangent": expected.shape, "direction": signal.shape})

    @jax.jit
    def batched(signals):
        """Values, and gradients of their inner product with a random cotangent."""

        def product(signal):
            features = log_mel(signal)
            return jnp.sum(features * drawn["cotangent"]), features

        return jax.vmap(jax.grad(product, has_aux=True))(signals)

    silence = np.zeros_like(signal)
    gradients, features = batched(np.stack([signal, silence]).astype(np.float32))
    np.testing.assert_allclose(features[0], expected, atol=5e-5, rtol=0)
    step = 1e-6 * drawn["direction"].astype(np.float64)
    ends = [reference(32_768 * (signal + sign * step)) for sign in (1, -1)]
    slope = np.sum(drawn["cotangent"] * (ends[0] - ends[1])) / 2e-6
    measured = np.sum(np.asarray(gradients[0], np.float64) * drawn["direction"])
    np.testing.assert_allclose(measured, slope, rtol=1e-3)
    # Silence: the floor, which does not move.
    np.testing.assert_allclose(features[1], np.log(2.0**-23), rtol=1e-6)
    np.testing.assert_array_equal(gradients[1], silence)


def test_scales_of_samples():
    """The same sound as int16, as float in [-1, 1], and on a scale that is told."""
    signal = _sound(8000)
    log_mel = functools.partial(sound.log_mel, **SETTINGS["telephone"])
    features = log_mel(signal)
    for same, scale in (
        (signal / 32_768, None),
        (signal.astype(np.float32), 1.0),
        (signal.astype(np.int32) << 16, 2.0**-16),
    ):
        np.testing.assert_array_equal(log_mel(same, sample_scale=scale), features)
    louder = log_mel(signal, sample_scale=2.0)
    np.testing.assert_allclose(louder, features + np.log(4.0), atol=1e-5)


def test_a_stream_gives_the_features_of_the_whole():
    options = dict(SETTINGS["telephone"])
    signal = _sound(8000)[:1231]
    window, hop = sound.frame_sizes(8000, options["window_ms"], options["hop_ms"])
    whole = sound.log_mel(signal, **options)
    del options["window_ms"], options["hop_ms"]
    parts, kept = [], signal[:0]
    # The first brings no whole frame, the last a sample too many.
    for chunk in np.split(signal, [30, 330, 630, 930]):
        kept = np.concatenate([kept, chunk])
        count = inputs.num_frames(len(kept), window, hop)
        if count:
            pieces = inputs.frames(kept, window, hop)
            parts.append(sound.log_mel_of_frames(pieces, **options))
            kept = kept[count * hop :]
    assert len(parts) > 3
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5, rtol=0)
    signal = _sound(8000)
    pieces = inputs.frames(signal, window, hop)
    np.testing.assert_array_equal(
        sound.mfcc_of_frames(pieces, **options, **CEPSTRUM),
        sound.mfcc(signal, **SETTINGS["telephone"], **CEPSTRUM),
    )


# Rates of change.


def test_deltas_are_slopes_of_fitted_lines(draw):
    features = draw({"x": (12, 3)})["x"]
    for width in (1, 3):
        ours = sound.deltas(features, width)
        fitted = savgol_filter(
            features, 2 * width + 1, polyorder=1, deriv=1, axis=0, mode="nearest"
        )
        np.testing.assert_allclose(ours, fitted, atol=1e-6)
    np.testing.assert_array_equal(sound.deltas(features[:1]), np.zeros((1, 3)))
    # By hand, at both edges: 1, 2, 4, 8 with 1 and 8 repeated.
    x = jnp.array([1.0, 2.0, 4.0, 8.0])[:, None]
    expected = np.array([[0.7], [1.7], [2.0], [1.6]])  # Such as (1 + 2 · 3) / 10.
    np.testing.assert_allclose(sound.deltas(x), expected, atol=1e-6)
    # Rounded to a smaller dtype once, at the end.
    small = jnp.asarray(features, jnp.bfloat16)
    wide = sound.deltas(small.astype(jnp.float32), 3)
    np.testing.assert_array_equal(
        sound.deltas(small, 3), wide.astype(jnp.bfloat16), strict=True
    )


def test_with_deltas_is_that_of_kaldi(kaldi, draw):
    """Also where the sequence is shorter than what the derivatives look at."""
    for shape, order, width in (((12, 3), 2, 2), ((4, 3), 3, 2)):
        features = draw({"x": shape})["x"]
        options = kaldi.DeltaOptions()
        options.order, options.window = order, width
        ours = sound.with_deltas(features, order, width=width)
        reference = kaldi.compute_deltas(options, features)
        np.testing.assert_allclose(ours, reference, atol=1e-6)
    np.testing.assert_array_equal(sound.with_deltas(features, 0), features)


# Bad input.

SHORT = np.zeros(399, np.float32)
SOUND = np.zeros(400, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sound.frame_sizes(0), ValueError, "`sample_rate` .* than 0"),
        (lambda: sound.frame_sizes(8000, 0.2), ValueError, "`window_ms` .* 2 .* 1.6"),
        (lambda: sound.frame_sizes(hop_ms=0.01), ValueError, "`hop_ms` .* 1 sam"),
        (lambda: sound.frame_sizes("8k"), TypeError, "`sample_rate` .* str"),
        (lambda: sound.mel_filters(0, 512, 8000), ValueError, "`num_mels`"),
        (lambda: sound.mel_filters(99, 256, 8000), ValueError, "`num_mels` .* fewer"),
        (lambda: sound.mel_filters(9, 512, 8000, 20, 4001), ValueError, "`high`.*400"),
        (lambda: sound.mel_filters(9, 512, 8000, 4000), ValueError, "`low` .* 4000"),
        (lambda: sound.mel_filters(9, 512, 8000, -1.0), ValueError, "`low` .* least"),
        (lambda: sound.log_mel(SHORT), ValueError, "`signal` .* 400 .* 399"),
        (lambda: sound.mfcc(SHORT), ValueError, "`signal` .* 400 .* 399"),
        (
            lambda: sound.log_mel(SOUND.astype(np.int32)),
            TypeError,
            "`signal` .* int32.*`sample_scale`",
        ),
        (
            lambda: sound.log_mel(SOUND.astype(np.uint8), sample_scale=1.0),
            TypeError,
            "`signal` .* signed .* uint8",
        ),
        (
            lambda: sound.log_mel(SOUND, sample_scale=0.0),
            ValueError,
            "`sample_scale` .* greater than 0",
        ),
        (
            lambda: sound.log_mel(SOUND, preemphasis=1.5),
            ValueError,
            "`preemphasis` .* at least 0 and at most 1",
        ),
        (
            lambda: sound.log_mel(SOUND, window_type="hanning"),
            ValueError,
            "`window_type` .* hann, .*'hanning'",
        ),
        (
            lambda: sound.log_mel(SOUND, high=float("nan")),
            ValueError,
            "`high` .* finite",
        ),
        (lambda: sound.log_mel_of_frames(SOUND), ValueError, r"`frames` .*\[T, win"),
        (
            lambda: sound.log_mel_of_frames(SOUND[:, None]),
            ValueError,
            "`frames` .* at least 2",
        ),
        (lambda: sound.mfcc(SOUND, num_ceps=24), ValueError, "`num_ceps` .* 23"),
        (lambda: sound.mfcc(SOUND, lifter=-1.0), ValueError, "`lifter` .* least 0"),
        (lambda: sound.deltas(SOUND), ValueError, r"`features` .*\[T, F\]"),
        (lambda: sound.deltas(np.ones((2, 1), int)), TypeError, "`features` .* int"),
        (lambda: sound.deltas(np.ones((0, 1))), ValueError, "`features` .* one fr"),
        (lambda: sound.deltas(np.ones((2, 1)), 0), ValueError, "`width` .* least 1"),
        (lambda: sound.with_deltas(SOUND[None], -1), ValueError, "`order` .* least 0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
