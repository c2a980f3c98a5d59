/* The schemes' formulas: range and moments of some values -> scale and zero point. */
#ifndef QSPARSEPROP_SCALE_H
#define QSPARSEPROP_SCALE_H

#include "isa/common.h"

/* The scale that maps [-absmax, absmax] to [-levels, levels]. Never below 2^-111, so that 2^16 / scale is finite: tiny
 * tensors keep |x - q * scale| <= scale / 2. NaN and Inf stay what they are and reach the output. */
#define QSP_MIN_SCALE 0x1p-111f

QSP_INLINE float qsp_symmetric_scale(float absmax, float levels)
{
    const float scale = absmax / levels;
    return scale < QSP_MIN_SCALE ? QSP_MIN_SCALE : scale;
}

/* Scale and zero point that map [low, high], widened to hold 0, to 0..top. */
QSP_INLINE float qsp_affine_scale(float low, float high, float top, int32_t *zero_point)
{
    low = low < 0.0f ? low : 0.0f;
    high = high > 0.0f ? high : 0.0f;
    const float scale = qsp_symmetric_scale(high / top - low / top, 1.0f);
    const float zero = rintf(-low * (1.0f / scale));
    *zero_point = (int32_t)(zero < top ? zero : top);
    return scale;
}

/* Largest code of values of both signs. */
QSP_INLINE int32_t qsp_levels(const qsp_scheme *s) { return (1 << (s->bits - 1)) - 1; }

/* Whether codes may leave their range before they are limited: every scheme but those that map a largest magnitude to
 * the ends of eight bits, which saturate by themselves. */
QSP_INLINE int qsp_is_limited(const qsp_scheme *s) { return s->bits < 8 || s->kind == QSP_SAWB || s->fixed; }
QSP_INLINE int qsp_wants_moments(const qsp_scheme *s) { return s->kind == QSP_SAWB || s->kind == QSP_DITHERED; }
QSP_INLINE int qsp_is_random(const qsp_scheme *s)
{
    return s->kind == QSP_STOCHASTIC || s->kind == QSP_DITHERED || s->kind == QSP_LUQ;
}

/* Add places [first, last) of a state of `places` of them to the moments and the range of a channel. */
QSP_INLINE void qsp_add_moments(const void *state, int64_t places, int64_t first, int64_t last, qsp_range *r,
                                qsp_moments *m)
{
    const double *sums = state;
    const void *behind = sums + 3 * places;
    const float *range = behind;
    for (int64_t i = first; i < last; i++) {
        m->sum += sums[i];
        m->square += sums[places + i];
        m->nonzeros += sums[2 * places + i];
        if (!(range[i] <= r->absmax) && r->absmax == r->absmax)
            r->absmax = range[i];
        r->min = range[places + i] < r->min ? range[places + i] : r->min;
    }
}

/* Statistics-aware weight binning, clip = c1 sqrt(E x^2) - c2 E|x| (Choi et al., arXiv 1807.06964): never more than the
 * largest magnitude, which it also is where the formula gives nothing positive. */
QSP_INLINE float qsp_sawb_clip(const qsp_scheme *s, float absmax, const qsp_moments *m)
{
    const double n = s->nonzeros ? m->nonzeros : m->count;
    const double clip = n > 0 ? s->c1 * sqrt(m->square / n) - s->c2 * (m->sum / n) : 0.0;
    return clip > 0.0 && clip < (double)absmax ? (float)clip : absmax;
}

/* 1 / scale; of schemes that round at random, whose codes are not limited, less by as little as it takes for no product
 * to be beyond the last code. */
QSP_INLINE float qsp_inverse(const qsp_scheme *s, float absmax, float scale)
{
    float inverse = 1.0f / scale;
    if (qsp_is_random(s)) {
        const float most = (float)(s->kind == QSP_LUQ ? 1 << (s->levels - 1) : qsp_levels(s));
        while (absmax * inverse > most)
            inverse = nextafterf(inverse, 0.0f);
    }
    return inverse;
}

/* Scale of a range (and, where wanted, moments), with its reciprocal and zero point. Where an element is NaN or Inf all
 * become zeros, and the scale keeps the result from looking like a number. Zero points of int8 codes are counted from
 * -128, so that codes are made alike. */
QSP_INLINE float qsp_scale(const qsp_scheme *s, const qsp_range *r, const qsp_moments *m, int32_t *zero, float *inverse)
{
    const int32_t levels = qsp_levels(s), top = 2 * levels + 1;
    float absmax = r->absmax, scale;
    *zero = s->around_zero ? 128 : levels + 1;
    *inverse = 0.0f;
    if (!isfinite(absmax))
        return absmax;
    if (s->kind == QSP_SAWB)
        absmax = qsp_sawb_clip(s, absmax, m);
    if (s->kind == QSP_AFFINE)
        scale = qsp_affine_scale(r->min, r->max, (float)top, zero);
    else if ((s->kind == QSP_ABSMAX || s->kind == QSP_SAWB) && !s->around_zero && r->min >= 0.0f) {
        scale = qsp_symmetric_scale(absmax, (float)top);
        *zero = 0;
    } else if (s->kind == QSP_LUQ)
        scale = qsp_symmetric_scale(absmax, (float)(1 << (s->levels - 1)));
    else
        scale = qsp_symmetric_scale(absmax, (float)levels);
    if (s->kind == QSP_DITHERED && m->count > 0) {
        /* a step below absmax / levels would saturate: constant values have none at all */
        const double mean = m->sum / m->count, variance = m->square / m->count - mean * mean;
        const double step = s->step * sqrt(variance > 0.0 ? variance : 0.0);
        scale = step > (double)scale ? (float)step : scale;
    }
    *inverse = qsp_inverse(s, r->absmax, scale);
    return scale;
}

/* Scales of a linear layer's gradient that are less than that part of the greatest one are made this part of it.
 *
 * They are multiplied into the weights, which are rounded to nearest with one scale for all channels: the quieter a
 * channel, the coarser its weights, and their error is the same in every step. It does not average out where the
 * channel's gradient has one sign, as that of a class or token which hardly ever comes. What the gradient loses by a
 * larger scale is rounded at random, without bias. Plane i has channel i % channels.
 *
 * Not those of convolutions: their channels differ for other reasons (filters that are empty, or groups of their own, and
 * a normalisation behind them), the pixels' gradients have both signs, and weight gradients would pay for nothing. */
#define QSP_QUIETEST 0x1p-4f

QSP_INLINE void qsp_raise_quiet(const qsp_scheme *s, const qsp_range *ranges, int64_t channels, int64_t planes,
                                float *scale, float *inverse)
{
    float least = 0.0f;
    for (int64_t i = 0; i < planes; i++)
        if (isfinite(scale[i]) && QSP_QUIETEST * scale[i] > least)
            least = QSP_QUIETEST * scale[i];
    for (int64_t i = 0; i < planes; i++)
        if (scale[i] < least) {
            scale[i] = least;
            inverse[i] = qsp_inverse(s, ranges[i % channels].absmax, least);
        }
}

#endif
