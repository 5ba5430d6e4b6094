"""Features of sound: log-mel energies, cepstra and their rates of change, as in Kaldi.

Sound is cut into short frames (`attn_jax.inputs.frames`), each of which gives the
energies of its spectrum (`log_mel`) or its cepstrum (`mfcc`). Same framing, same
filters, same scale as Kaldi's. All functions are pure and take one example.

Letters: n samples of a signal, T frames, F the size of a vector.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype
from attn_jax.inputs import frames

__all__ = [
    "deltas",
    "frame_sizes",
    "log_mel",
    "log_mel_of_frames",
    "mel_filters",
    "mfcc",
    "mfcc_of_frames",
    "with_deltas",
]

WindowType = Literal["povey", "hamming", "hann", "rectangular"]

# No energy is taken to be less, so that the logarithm of silence is finite.
_LEAST_ENERGY = float(np.finfo(np.float32).eps)

# From the range of float audio, [-1, 1], to that of 16-bit audio.
_FULL_SCALE = 32_768.0


def _check_real(
    name: str,
    given: float,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """Checks that a static option is a finite number within bounds."""
    if isinstance(given, bool) or not isinstance(
        given, int | float | np.integer | np.floating
    ):
        raise TypeError(
            f"`{name}` must be a number known at trace time, but is "
            f"{type(given).__name__}: {given!r}."
        )
    if not (math.isfinite(given) and above < given and least <= given <= most):
        bounds = [
            text
            for bound, text in (
                (above, f"greater than {above:g}"),
                (least, f"at least {least:g}"),
                (most, f"at most {most:g}"),
            )
            if math.isfinite(bound)
        ]
        raise ValueError(
            f"`{name}` must be finite"
            + "".join(f" and {text}" for text in bounds)
            + f", but is {given}."
        )
    return float(given)


def frame_sizes(
    sample_rate: float = 16_000.0, window_ms: float = 25.0, hop_ms: float = 10.0
) -> tuple[int, int]:
    """Window and hop in samples, as `log_mel` and `mfcc` use them: rounded down.

    Args:
      sample_rate: samples a second.
      window_ms: length of a frame in milliseconds.
      hop_ms: distance between the starts of two frames in milliseconds.

    Returns:
      (window, hop) in samples.

    Raises:
      ValueError: if one is not positive, the window has fewer than 2 samples, or the
        hop has none.
      TypeError: if one is no number.

    >>> frame_sizes(11_025)
    (275, 110)
    """
    sample_rate = _check_real("sample_rate", sample_rate, above=0)
    sizes = []
    for name, given, least in (("window_ms", window_ms, 2), ("hop_ms", hop_ms, 1)):
        exact = sample_rate * _check_real(name, given, above=0) / 1000
        # Whole samples, given in milliseconds, may come back a hair too few.
        size = math.floor(exact + 1e-6)
        if size < least:
            raise ValueError(
                f"`{name}` must come to at least {least} samples, but {given} ms at "
                f"{sample_rate:g} Hz come to {exact:g}."
            )
        sizes.append(size)
    return sizes[0], sizes[1]


def _mel(frequency: Any) -> Any:
    """The mel scale, 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(np.asarray(frequency, np.float64) / 700.0)


def mel_filters(
    num_mels: int,
    fft_size: int,
    sample_rate: float,
    low: float = 20.0,
    high: float | None = None,
) -> jax.Array:
    """Triangular filters of equal width on the mel scale, each half over the next.

    w[m, i] = max(0, 1 − |mel(f_i) − c_m| / Δ),  f_i = i · sample_rate / fft_size,
    c_m = mel(low) + (m + 1) Δ,  Δ = (mel(high) − mel(low)) / (num_mels + 1),
    mel(f) = 1127 ln(1 + f / 700)

    Args:
      num_mels: number of filters.
      fft_size: number of points of the Fourier transform.
      sample_rate: samples a second.
      low: where the first filter begins, in Hz.
      high: where the last filter ends, in Hz; None for half the sample rate.

    Returns:
      [num_mels, fft_size // 2 + 1] float32, to be multiplied with a power spectrum.

    Raises:
      ValueError: if a size is not positive, 0 ≤ low < high ≤ sample_rate / 2 does not
        hold, or there are so many filters that one lies between two frequencies.
      TypeError: if a size is no int or a frequency no number.

    Reference: Davis and Mermelstein, 1980, doi:10.1109/TASSP.1980.1163420, for the
      filters; Povey et al., "The Kaldi Speech Recognition Toolkit", ASRU 2011, for the
      scale and the triangles on it.

    >>> np.asarray(mel_filters(3, 8, 8000, low=0.0)[1]).round(2)
    array([0.  , 0.86, 0.16, 0.  , 0.  ], dtype=float32)
    """
    num_mels = _checks.check_int("num_mels", num_mels, 1)
    fft_size = _checks.check_int("fft_size", fft_size, 2)
    sample_rate = _check_real("sample_rate", sample_rate, above=0)
    half = sample_rate / 2
    high = half if high is None else _check_real("high", high, above=0, most=half)
    low = _check_real("low", low, least=0)
    if low >= high:
        raise ValueError(f"`low` must be below `high`, {high:g} Hz, but is {low:g} Hz.")
    width = (_mel(high) - _mel(low)) / (num_mels + 1)
    centres = _mel(low) + width * np.arange(1, num_mels + 1)
    frequencies = np.arange(fft_size // 2 + 1) * (sample_rate / fft_size)
    distance = np.abs(_mel(frequencies)[None, :] - centres[:, None])
    filters = 1.0 - distance / width
    # The corners, such as that at `high`, may come out a hair above zero.
    filters = np.where(filters > 1e-9, filters, 0.0)
    empty = int(np.sum(~filters.any(axis=1)))
    if empty:
        raise ValueError(
            f"`num_mels` is too large: {empty} of {num_mels} filters between {low:g} "
            f"and {high:g} Hz see none of the frequencies, which are "
            f"{sample_rate / fft_size:g} Hz apart; take fewer filters or longer frames."
        )
    return jnp.asarray(filters, jnp.float32)


def _taper(window_type: WindowType, window: int) -> jax.Array:
    """The factors of the samples of a frame, `[window]`."""
    cosine = np.cos(2 * np.pi * np.arange(window) / (window - 1))
    if window_type == "povey":
        factors = (0.5 - 0.5 * cosine) ** 0.85
    elif window_type == "hamming":
        factors = 0.54 - 0.46 * cosine
    elif window_type == "hann":
        factors = 0.5 - 0.5 * cosine
    elif window_type == "rectangular":
        factors = np.ones(window)
    else:
        raise ValueError(
            f"`window_type` must be one of {', '.join(get_args(WindowType))}, but is "
            f"{window_type!r}."
        )
    return jnp.asarray(factors, jnp.float32)


def _scale(dtype: jnp.dtype, sample_scale: float | None) -> float:
    """What samples of a dtype are multiplied by, to be on the scale of int16."""
    real = jnp.issubdtype(dtype, jnp.floating)
    if sample_scale is not None:
        if not real and not jnp.issubdtype(dtype, jnp.signedinteger):
            raise TypeError(
                "The samples, `signal` or `frames`, must be float or signed integers, "
                f"but have dtype {dtype}."
            )
        return _check_real("sample_scale", sample_scale, above=0)
    if not real and dtype != jnp.int16:
        raise TypeError(
            "The samples, `signal` or `frames`, must be float in [-1, 1] or int16, but "
            f"have dtype {dtype}; convert them, or say by `sample_scale` what brings "
            "other signed integers to the range of int16."
        )
    return _FULL_SCALE if real else 1.0


@functools.partial(jax.jit, static_argnames="use_energy")
def _features(
    samples: jax.Array,
    scale: float,
    preemphasis: float,
    taper: jax.Array,
    filters: jax.Array,
    cosines: jax.Array | None,
    use_energy: bool,
) -> jax.Array:
    """Frames [T, window] to log-mel energies, or, given cosines, to a cepstrum."""
    # Accelerators would else round the factors of a product to 10 bits or fewer.
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    samples = samples * scale
    samples = samples - jnp.mean(samples, axis=1, keepdims=True)
    # The sample before the first is taken to equal the first.
    before = jnp.concatenate([samples[:, :1], samples[:, :-1]], axis=1)
    shaped = (samples - preemphasis * before) * taper[None, :]
    spectrum = jnp.fft.rfft(shaped, 2 * (filters.shape[1] - 1), axis=1)
    power = spectrum.real**2 + spectrum.imag**2
    features = _log(product(power, filters.T))
    if cosines is not None:
        features = product(features, cosines)
    if use_energy:
        total = _log(jnp.sum(samples**2, axis=1, keepdims=True))
        features = jnp.concatenate([total, features[:, 1:]], axis=1)
    return features


def _log(energy: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(energy, _LEAST_ENERGY))


def _features_of_frames(
    given: ArrayLike,
    sample_rate: float,
    num_mels: int,
    low: float,
    high: float | None,
    preemphasis: float,
    window_type: WindowType,
    sample_scale: float | None,
    cosines: jax.Array | None = None,
    use_energy: bool = False,
) -> jax.Array:
    """Checks the options, and makes tables of them for `_features`."""
    samples = jnp.asarray(given)
    _checks.check_shape("frames", samples, ("T", "window"), {})
    window = samples.shape[1]
    if window < 2:
        raise ValueError(
            "`frames` must have at least 2 samples each, but has shape "
            f"{samples.shape}."
        )
    fft_size = 1 << (window - 1).bit_length()
    return _features(
        # Here, and so one program serves all dtypes.
        samples.astype(jnp.float32),
        _scale(samples.dtype, sample_scale),
        _check_real("preemphasis", preemphasis, least=0, most=1),
        _taper(window_type, window),
        mel_filters(num_mels, fft_size, sample_rate, low, high),
        cosines,
        use_energy,
    )


def log_mel_of_frames(
    frames: ArrayLike,
    *,
    sample_rate: float = 16_000.0,
    num_mels: int = 40,
    low: float = 20.0,
    high: float | None = None,
    preemphasis: float = 0.97,
    window_type: WindowType = "povey",
    sample_scale: float | None = None,
) -> jax.Array:
    """Log-mel energies of frames, each on its own: what `log_mel` does after `frames`.

    As no frame knows of another, a stream can be served as it comes: of the samples
    that have arrived, take `frames`, and keep those from sample T · hop on for the next
    time. The features are those of the whole signal.

    Args:
      frames: [T, window], on the scale that `log_mel` tells of; so are its options.

    Returns:
      [T, num_mels] float32.

    Raises:
      ValueError: on a wrong shape or an option out of range.
      TypeError: on samples neither float nor int16, without `sample_scale`.

    Reference: Povey et al., "The Kaldi Speech Recognition Toolkit", ASRU 2011.

    >>> window, hop = frame_sizes()
    >>> log_mel_of_frames(frames(np.sin(np.arange(16_000)), window, hop)).shape
    (98, 40)
    """
    return _features_of_frames(
        frames,
        sample_rate,
        num_mels,
        low,
        high,
        preemphasis,
        window_type,
        sample_scale,
    )


def log_mel(
    signal: ArrayLike,
    *,
    sample_rate: float = 16_000.0,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    num_mels: int = 40,
    low: float = 20.0,
    high: float | None = None,
    preemphasis: float = 0.97,
    window_type: WindowType = "povey",
    sample_scale: float | None = None,
) -> jax.Array:
    """Log-mel filterbank energies, the usual input of speech models, as in Kaldi.

    x[t, m] = ln max(ε, Σ_i w[m, i] |Z_t[i]|²),
    Z_t = DFT of (y[i] − preemphasis · y[i − 1]) · taper[i],  y = frame t less its mean

    with w those of `mel_filters`, ε = 2⁻²³, the frame filled up with zeros to a power
    of two, and y[−1] = y[0]. It is Kaldi's compute-fbank-feats with a dither of 0.

    Args:
      signal: [n] samples: int16, or float in [−1, 1], which is multiplied by 32768 to
        be on the same scale. Both readings of one file give the same features.
      sample_rate: samples a second.
      window_ms: length of a frame in milliseconds.
      hop_ms: distance between the starts of two frames in milliseconds.
      num_mels: number of filters, F.
      low: where the first filter begins, in Hz.
      high: where the last filter ends, in Hz; None for half the sample rate.
      preemphasis: part of the sample before that is subtracted, in 0 … 1; 0 for none.
      window_type: the taper. "hann", the symmetric one that Kaldi calls hanning; its
        power 0.85, "povey"; "hamming"; or "rectangular" for none.
      sample_scale: what the samples are multiplied by, to come to the range of int16,
        instead of the rule for `signal`. 1 for floats that are in that range already,
        as Kaldi reads them; 2⁻¹⁶ for int32 audio.

    Returns:
      [T, num_mels] float32, T = 1 + ⌊(n − window) / hop⌋ with window and hop in samples
      as of `frame_sizes`.

    Raises:
      ValueError: if `signal` is no vector or shorter than one frame, or an option is
        out of range.
      TypeError: if samples are neither float nor int16, without `sample_scale`.

    Reference: Povey et al., "The Kaldi Speech Recognition Toolkit", ASRU 2011.

    >>> log_mel(np.sin(np.arange(16_000))).shape
    (98, 40)
    """
    return log_mel_of_frames(
        frames(signal, *frame_sizes(sample_rate, window_ms, hop_ms)),
        sample_rate=sample_rate,
        num_mels=num_mels,
        low=low,
        high=high,
        preemphasis=preemphasis,
        window_type=window_type,
        sample_scale=sample_scale,
    )


def mfcc_of_frames(
    frames: ArrayLike,
    *,
    sample_rate: float = 16_000.0,
    num_ceps: int = 13,
    num_mels: int = 23,
    lifter: float = 22.0,
    use_energy: bool = False,
    low: float = 20.0,
    high: float | None = None,
    preemphasis: float = 0.97,
    window_type: WindowType = "povey",
    sample_scale: float | None = None,
) -> jax.Array:
    """Mel-frequency cepstral coefficients of frames: what `mfcc` does after `frames`.

    For streams, see `log_mel_of_frames`.

    Args:
      frames: [T, window], on the scale that `log_mel` tells of; options as of `mfcc`.

    Returns:
      [T, num_ceps] float32.

    Raises:
      ValueError: on a wrong shape or an option out of range.
      TypeError: on samples neither float nor int16, without `sample_scale`.

    Reference: Davis and Mermelstein, 1980, doi:10.1109/TASSP.1980.1163420.

    >>> mfcc_of_frames(frames(np.sin(np.arange(16_000)), 400, 160)).shape
    (98, 13)
    """
    num_mels = _checks.check_int("num_mels", num_mels, 1)
    num_ceps = _checks.check_int("num_ceps", num_ceps, 1)
    if num_ceps > num_mels:
        raise ValueError(
            f"`num_ceps` must be at most `num_mels`, {num_mels}, but is {num_ceps}."
        )
    lifter = _check_real("lifter", lifter, least=0)
    k = np.arange(num_ceps)
    angle = np.pi / num_mels * (np.arange(num_mels)[:, None] + 0.5) * k[None, :]
    cosines = np.sqrt(np.where(k == 0, 1.0, 2.0) / num_mels) * np.cos(angle)
    if lifter:
        cosines = cosines * (1.0 + 0.5 * lifter * np.sin(np.pi * k / lifter))
    return _features_of_frames(
        frames,
        sample_rate,
        num_mels,
        low,
        high,
        preemphasis,
        window_type,
        sample_scale,
        jnp.asarray(cosines, jnp.float32),
        bool(use_energy),
    )


def mfcc(
    signal: ArrayLike,
    *,
    sample_rate: float = 16_000.0,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    num_ceps: int = 13,
    num_mels: int = 23,
    lifter: float = 22.0,
    use_energy: bool = False,
    low: float = 20.0,
    high: float | None = None,
    preemphasis: float = 0.97,
    window_type: WindowType = "povey",
    sample_scale: float | None = None,
) -> jax.Array:
    """Mel-frequency cepstral coefficients, as in Kaldi.

    c[t, k] = (1 + lifter/2 · sin(π k / lifter)) · s_k Σ_m x[t, m] cos(π k (m + ½) / M),
    s_0 = √(1/M),  s_k = √(2/M)

    the cosine transform of the M = num_mels energies x of `log_mel`, in which
    neighbours hang together, and the first of its coefficients, which hardly do. The
    first factor is 1 if `lifter` is 0; it makes the high ones as large as the low ones.

    Args:
      signal: [n] samples; what is not told of here is as in `log_mel`.
      num_ceps: number of coefficients, F, the zeroth included.
      num_mels: number of filters.
      lifter: period of the factor above; 0 for none.
      use_energy: whether coefficient 0 gives way to ln max(ε, Σ_i y[i]²), the energy of
        the frame less its mean. Kaldi's program does so by default, most of its recipes
        do not.

    Returns:
      [T, num_ceps] float32, T as in `log_mel`.

    Raises:
      ValueError: if `signal` is no vector or shorter than one frame, or an option is
        out of range.
      TypeError: if samples are neither float nor int16, without `sample_scale`.

    Reference: Davis and Mermelstein, 1980, doi:10.1109/TASSP.1980.1163420; Povey et
      al., "The Kaldi Speech Recognition Toolkit", ASRU 2011, for the details.

    >>> with_deltas(mfcc(np.sin(np.arange(16_000)))).shape
    (98, 39)
    """
    return mfcc_of_frames(
        frames(signal, *frame_sizes(sample_rate, window_ms, hop_ms)),
        sample_rate=sample_rate,
        num_ceps=num_ceps,
        num_mels=num_mels,
        lifter=lifter,
        use_energy=use_energy,
        low=low,
        high=high,
        preemphasis=preemphasis,
        window_type=window_type,
        sample_scale=sample_scale,
    )


@functools.partial(jax.jit, static_argnames=("order", "width"))
def _deltas(features: jax.Array, order: int, width: int) -> list[jax.Array]:
    """The first to the last derivative, each `[T, F]`."""
    count = features.shape[0]
    wide = features.astype(score_dtype(features.dtype))
    wide = jnp.pad(wide, ((order * width, order * width), (0, 0)), mode="edge")
    total = 2 * sum(n * n for n in range(1, width + 1))
    blocks = []
    for left in reversed(range(order)):
        # Each derivative needs, and loses, `width` frames at both ends.
        rows = count + 2 * left * width
        slopes = jnp.zeros((rows, features.shape[1]), wide.dtype)
        for n in range(1, width + 1):
            after, before = wide[width + n :], wide[width - n :]
            slopes = slopes + n / total * (after[:rows] - before[:rows])
        wide = slopes
        blocks.append(wide[left * width :][:count].astype(features.dtype))
    return blocks


def with_deltas(features: ArrayLike, order: int = 2, *, width: int = 2) -> jax.Array:
    """Features with their rates of change: [ c ; Δc ; ΔΔc ; … ] of each frame.

    Δc is `deltas(c)`, and ΔΔc the same of Δc, where frames before the first and after
    the last repeat c, as in Kaldi, and not Δc, as in HTK. So ΔΔc is not
    `deltas(deltas(c))` within `width` frames of either end.

    Args:
      features: [T, F] float.
      order: how often to differentiate; 0 for not at all.
      width: see `deltas`.

    Returns:
      [T, F · (order + 1)], in the dtype of `features`.

    Raises:
      ValueError: if `features` is no matrix or has no frame, `order` is negative, or
        `width` is not positive.
      TypeError: if `features` is not floating-point, or `order` or `width` no int.

    Reference: Furui, 1986, doi:10.1109/TASSP.1986.1164788.

    >>> with_deltas(jnp.arange(9.0)[:, None] ** 2)[4].tolist()
    [16.0, 8.0, 2.0]
    """
    order = _checks.check_int("order", order, 0)
    width = _checks.check_int("width", width, 1)
    features = jnp.asarray(features)
    _checks.check_shape("features", features, ("T", "F"), {})
    _checks.check_float("features", features)
    if features.shape[0] == 0:
        raise ValueError(
            f"`features` must have at least one frame, but has shape {features.shape}."
        )
    return jnp.concatenate([features, *_deltas(features, order, width)], axis=1)


def deltas(features: ArrayLike, width: int = 2) -> jax.Array:
    """Rates of change a frame: slopes of the lines that fit 2 · width + 1 frames best.

    Δc_t = Σ_n n (c_{t+n} − c_{t−n}) / (2 Σ_n n²),  n = 1 … width

    Frames before the first are the first, those after the last are the last.

    Args:
      features: [T, F] float.
      width: how many frames to either side count.

    Returns:
      [T, F], in the dtype of `features`.

    Raises:
      ValueError: if `features` is no matrix or has no frame, or `width` is not
        positive.
      TypeError: if `features` is not floating-point or `width` is no int.

    Reference: Furui, 1986, doi:10.1109/TASSP.1986.1164788.

    >>> deltas(jnp.array([[1.0], [2.0], [4.0]]), width=1).tolist()
    [[0.5], [1.5], [1.0]]
    """
    both = with_deltas(features, order=1, width=width)
    return both[:, both.shape[1] // 2 :]
