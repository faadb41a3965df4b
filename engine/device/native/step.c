/* A whole forward pass in one call: a team of threads walks through the layers together. */
#define _GNU_SOURCE
#include "step.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

/* --- the team --- */

/* Who waits stays awake for so long at most: longer than what mostly lies between two phases or
 * two steps, shorter than a time slice.  Where waiting awake was in vain, as the others have no
 * core to themselves, it is tried for half as long the next time, and else for twice. */
enum { AWAKE_NS = 64000, AWAKE_NS_MIN = 1000, LOOKS_PER_CLOCK = 16, ALIGNMENT = 64 };

struct pd_team {
    int32_t threads;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int phase;
    atomic_int sleepers;
    atomic_int awake_ns;
    _Alignas(64) atomic_int taken; /* spans given out */
    pthread_mutex_t lock;
    pthread_cond_t moved;
    pthread_t *helpers;
    int is_closing;
    struct step *step;
    char *memory;
    size_t memory_bytes;
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int is_past(pd_team *team, int phase) {
    return atomic_load_explicit(&team->phase, memory_order_acquire) != phase;
}

static int await_awake(pd_team *team, int phase, int longest_ns) {
    int64_t start_ns = now_ns();
    do {
        for (int i = 0; i < LOOKS_PER_CLOCK; i++) {
            if (is_past(team, phase)) return 1;
            relax();
        }
    } while (now_ns() - start_ns < longest_ns);
    return is_past(team, phase);
}

static void await_asleep(pd_team *team, int phase) {
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->phase) == phase) pthread_cond_wait(&team->moved, &team->lock);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->lock);
}

/* Give the phase to await the end of, or -1 where this thread was the last and ended it. */
static int arrive(pd_team *team) {
    int phase = atomic_load(&team->phase);
    if (atomic_fetch_add(&team->arrived, 1) < team->threads - 1) return phase;
    atomic_store(&team->arrived, 0);
    atomic_store(&team->phase, (phase + 1) & INT32_MAX);
    if (atomic_load(&team->sleepers)) {
        pthread_mutex_lock(&team->lock);
        pthread_cond_broadcast(&team->moved);
        pthread_mutex_unlock(&team->lock);
    }
    return -1;
}

static void await_all(pd_team *team) {
    if (team->threads == 1) return;
    int phase = arrive(team);
    if (phase < 0) return;
    int awake_ns = atomic_load_explicit(&team->awake_ns, memory_order_relaxed);
    int was_short = await_awake(team, phase, awake_ns);
    int next_ns = was_short ? 2 * awake_ns : awake_ns / 2;
    if (next_ns >= AWAKE_NS_MIN && next_ns <= AWAKE_NS)
        atomic_store_explicit(&team->awake_ns, next_ns, memory_order_relaxed);
    if (!was_short) await_asleep(team, phase);
}

/* The helpers' wait for a step, which says nothing about cores. */
static void await_step(pd_team *team) {
    int phase = arrive(team);
    if (phase >= 0 && !await_awake(team, phase, AWAKE_NS)) await_asleep(team, phase);
}

static void walk(struct step *step, int thread);

typedef struct {
    pd_team *team;
    int thread;
} Helper;

static void *help(void *argument) {
    Helper own = *(Helper *)argument;
    free(argument);
    pthread_mutex_lock(&own.team->lock); /* held until it is known how many we are */
    pthread_mutex_unlock(&own.team->lock);
    for (;;) {
        await_step(own.team);
        if (own.team->is_closing) return NULL;
        walk(own.team->step, own.thread);
        await_all(own.team);
    }
}

void pd_team_free(pd_team *team) {
    if (team == NULL) return;
    team->is_closing = 1;
    await_all(team);
    for (int i = 0; i < team->threads - 1; i++) pthread_join(team->helpers[i], NULL);
    pthread_cond_destroy(&team->moved);
    pthread_mutex_destroy(&team->lock);
    free(team->helpers);
    free(team->memory);
    free(team);
}

pd_team *pd_team_new(int32_t threads) {
    pd_team *team = aligned_alloc(ALIGNMENT, sizeof(pd_team));
    if (team == NULL) return NULL;
    memset(team, 0, sizeof *team);
    team->threads = 1;
    atomic_store(&team->awake_ns, AWAKE_NS);
    team->helpers = calloc((size_t)threads, sizeof(pthread_t));
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->moved, NULL);
    pthread_mutex_lock(&team->lock);
    sigset_t all, before; /* signals are for the threads of the interpreter */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; team->helpers != NULL && i < threads; i++) {
        Helper *helper = malloc(sizeof *helper);
        if (helper == NULL) break;
        *helper = (Helper){team, i};
        if (pthread_create(&team->helpers[i - 1], NULL, help, helper) != 0) {
            free(helper);
            break;
        }
        team->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    int is_whole = team->threads == threads && team->helpers != NULL;
    pthread_mutex_unlock(&team->lock);
    if (is_whole) return team;
    pd_team_free(team);
    return NULL;
}

/* --- one step --- */

struct step {
    const pd_step_input *input;
    pd_team *team;
    int32_t token_count, wanted_count;
    int32_t status;
    size_t scratch_bytes;
    /* Below: in the team's memory. */
    float *hidden;     /* [token][hidden]: the residual; of the last layer on, wanted tokens only */
    float *narrow;     /* [token][..]: what the next linear layer reads */
    float *wide;       /* [token][..]: what a fused one wrote: q, k, v heads; or gate, up */
    char *prepared;    /* `narrow` as pd_linear_run reads it */
    char *scratch;     /* [thread][scratch_bytes] */
    int32_t *position; /* [token] */
    int32_t *wanted;   /* tokens whose logits are asked for, in order */
    const int32_t **blocks; /* [token]: its sequence's */
    pd_span *spans[2];      /* of all tokens, and of the wanted */
    int32_t span_count[2];
};

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static int is_in_range(const pd_step_input *input) {
    const pd_model *model = input->model;
    const int32_t *tokens = input->tokens, *blocks = input->blocks;
    for (int i = 0; i < input->row_count; i++) {
        pd_row row = input->rows[i];
        int64_t stop = (int64_t)row.start + row.count;
        if (row.start < 0 || row.count < 1 || stop > input->position_count) return 0;
        if (row.logit_count < 0 || row.logit_count > row.count) return 0;
        if (stop > (int64_t)row.block_count * model->block_tokens) return 0;
        for (int t = 0; t < row.count; t++)
            if (tokens[t] < 0 || tokens[t] >= model->vocab) return 0;
        for (int b = 0; b < row.block_count; b++)
            if (blocks[b] < 0 || blocks[b] >= input->pool_blocks) return 0;
        tokens += row.count;
        blocks += row.block_count;
    }
    return 1;
}

/* Cut `count` tokens of a sequence into spans, each for some heads; `to` NULL only counts them. */
static int cut(const struct step *step, pd_span whole, pd_span *to) {
    const pd_model *model = step->input->model;
    int heads = model->kv_head_count, made = 0, per_span = 1;
    int size = whole.count == 1 ? 1 : pd_span_tokens(model);
    /* Heads of one token are read together where there are other spans for the other threads. */
    if (whole.count == 1) {
        int parts = step->team->threads == 1 ? 1 : 4 * step->team->threads / step->input->row_count;
        parts = parts < 1 ? 1 : parts > heads ? heads : parts;
        per_span = (heads + parts - 1) / parts;
    }
    for (int at = 0; at < whole.count; at += size)
        for (int head = 0; head < heads; head += per_span, made++) {
            if (to == NULL) continue;
            pd_span span = whole;
            span.start += at, span.query += at, span.result += at;
            span.count = whole.count - at < size ? whole.count - at : size;
            span.head = head;
            span.head_stop = head + per_span < heads ? head + per_span : heads;
            to[made] = span;
        }
    return made;
}

/* Fill in what is known of each token, and the spans; without memory, only count. */
static void describe(struct step *step, int has_memory) {
    const pd_step_input *input = step->input;
    const int32_t *blocks = input->blocks;
    int32_t token = 0, wanted = 0;
    step->span_count[0] = step->span_count[1] = 0;
    for (int i = 0; i < input->row_count; i++) {
        pd_row row = input->rows[i];
        int32_t skipped = row.count - row.logit_count;
        pd_span spans[2] = {
            {.start = row.start, .count = row.count, .query = token, .result = token},
            {.start = row.start + skipped, .count = row.logit_count, .query = token + skipped,
             .result = wanted},
        };
        for (int k = 0; k < 2; k++) {
            spans[k].blocks = blocks;
            pd_span *to = has_memory ? step->spans[k] + step->span_count[k] : NULL;
            if (spans[k].count) step->span_count[k] += cut(step, spans[k], to);
        }
        for (int t = 0; has_memory && t < row.count; t++) {
            step->position[token + t] = row.start + t;
            step->blocks[token + t] = blocks;
            if (t >= skipped) step->wanted[wanted + t - skipped] = token + t;
        }
        token += row.count;
        wanted += row.logit_count;
        blocks += row.block_count;
    }
    step->token_count = token;
    step->wanted_count = wanted;
}

static void *take(char **next, size_t count, size_t size) {
    void *taken = *next;
    *next += (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return taken;
}

/* Place everything from `base` on; gives the bytes that takes. */
static size_t lay_out(struct step *step, char *base) {
    const pd_model *model = step->input->model;
    const pd_layer *layer = model->layers; /* all have one shape */
    size_t tokens = (size_t)step->token_count, hidden = (size_t)model->hidden;
    size_t middle = (size_t)model->middle, dim = (size_t)model->head_dim;
    size_t queries = (size_t)model->head_count * dim;
    size_t heads = queries + 2 * (size_t)model->kv_head_count * dim;
    const pd_linear *linears[] = {layer->qkv, layer->output, layer->gate_up, layer->down,
                                  model->head};
    size_t prepared = 0;
    for (int i = 0; i < 5; i++)
        prepared = larger(prepared, pd_prepared_bytes(linears[i], step->token_count));
    char *next = base;
    step->hidden = take(&next, tokens * hidden, sizeof(float));
    step->narrow = take(&next, tokens * larger(hidden, larger(queries, middle)), sizeof(float));
    step->wide = take(&next, tokens * larger(heads, 2 * middle), sizeof(float));
    step->prepared = take(&next, prepared, 1);
    step->scratch_bytes = (pd_attention_scratch_bytes(model) + ALIGNMENT - 1) & ~(size_t)63;
    step->scratch = take(&next, step->scratch_bytes, (size_t)step->team->threads);
    step->position = take(&next, tokens, sizeof(int32_t));
    step->wanted = take(&next, tokens, sizeof(int32_t));
    step->blocks = take(&next, tokens, sizeof(int32_t *));
    for (int k = 0; k < 2; k++)
        step->spans[k] = take(&next, (size_t)step->span_count[k], sizeof(pd_span));
    return (size_t)(next - base);
}

int32_t pd_step(pd_team *team, const pd_step_input *input) {
    struct step step = {.input = input, .team = team, .status = PD_DONE};
    if (!is_in_range(input)) return PD_OUT_OF_RANGE;
    describe(&step, 0);
    size_t bytes = lay_out(&step, NULL);
    if (bytes > team->memory_bytes) {
        free(team->memory);
        team->memory = aligned_alloc(ALIGNMENT, bytes);
        team->memory_bytes = team->memory == NULL ? 0 : bytes;
        if (team->memory == NULL) return PD_NO_MEMORY;
    }
    lay_out(&step, team->memory);
    describe(&step, 1);
    team->step = &step;
    atomic_store(&team->taken, 0);
    await_all(team);
    walk(&step, 0);
    await_all(team);
    return step.status;
}

/* --- what is done to each token --- */

static int share_start(int count, int thread, int threads) {
    return (int)((int64_t)count * thread / threads);
}

static void embed(const pd_model *model, int32_t token, float *to) {
    size_t size = (size_t)model->hidden, at = (size_t)token * size;
    const float *whole = (const float *)model->embedding + at;
    const uint16_t *halves = (const uint16_t *)model->embedding + at;
    for (size_t i = 0; i < size; i++) to[i] = model->embeds_half ? pd_widen(halves[i]) : whole[i];
}

/* Root mean square norm (Zhang and Sennrich, 2019); `to` may be `from`. */
static void normalise(const float *from, const float *weight, int size, float epsilon, float *to) {
    pd_vector sums[4] = {pd_all(0), pd_all(0), pd_all(0), pd_all(0)};
    for (int i = 0; i < size; i += PD_LANES) {
        int count = size - i < PD_LANES ? size - i : PD_LANES;
        pd_vector part = count == PD_LANES ? pd_load(from + i) : pd_load_some(from + i, count);
        sums[i / PD_LANES % 4] = pd_fma(part, part, sums[i / PD_LANES % 4]);
    }
    float mean = pd_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)size;
    float factor = 1.0f / sqrtf(mean + epsilon);
    for (int i = 0; i < size; i++) to[i] = from[i] * factor * weight[i];
}

/* Turn pairs (i, i + half) of a head by its position's angles (Su et al., RoFormer, 2021). */
static void turn(float *restrict head, const float *restrict cosine, const float *restrict sine,
                 int half) {
    for (int i = 0; i < half; i++) {
        float first = head[i], second = head[half + i];
        head[i] = first * cosine[i] - second * sine[i];
        head[half + i] = second * cosine[i] + first * sine[i];
    }
}

static void keep(const float *from, int size, int is_half, char *to) {
    if (!is_half) {
        memcpy(to, from, (size_t)size * sizeof(float));
        return;
    }
    uint16_t *halves = (uint16_t *)(void *)to;
    for (int i = 0; i < size; i++) halves[i] = pd_narrow(from[i]);
}

/* Queries and keys become normed and turned; keys and values go to the pool. */
static void place_heads(const struct step *step, int index, int token) {
    const pd_step_input *input = step->input;
    const pd_model *model = input->model;
    const pd_layer *layer = &model->layers[index];
    int dim = model->head_dim, half = dim / 2, is_half = model->keeps_half;
    int kv_size = model->kv_head_count * dim, heads = model->head_count + model->kv_head_count;
    int position = step->position[token];
    size_t at = (size_t)position * (size_t)half;
    float *row = step->wide + (size_t)token * (size_t)(heads * dim + kv_size);
    for (int i = 0; i < heads; i++) {
        const float *norm = i < model->head_count ? layer->q_norm : layer->k_norm;
        float *head = row + (size_t)i * (size_t)dim;
        if (norm != NULL) normalise(head, norm, dim, model->epsilon, head);
        turn(head, input->cosine + at, input->sine + at, half);
    }
    size_t kept = (size_t)kv_size * (is_half ? 2 : 4), block_tokens = (size_t)model->block_tokens;
    size_t block = (size_t)step->blocks[token][(size_t)position / block_tokens];
    size_t piece = (size_t)index * (size_t)input->pool_blocks + block;
    char *key = input->pool + (2 * piece * block_tokens + (size_t)position % block_tokens) * kept;
    const float *from = row + (size_t)model->head_count * (size_t)dim;
    keep(from, kv_size, is_half, key);
    keep(from + kv_size, kv_size, is_half, key + block_tokens * kept);
}

/* to = gate * sigmoid(gate) * up */
static void activate(const float *gate, const float *up, int count, float *to) {
    const pd_vector low = pd_all(-126.0f), high = pd_all(126.0f), one = pd_all(1.0f);
    for (int i = 0; i < count; i += PD_LANES) {
        int some = count - i < PD_LANES ? count - i : PD_LANES;
        pd_vector x = some == PD_LANES ? pd_load(gate + i) : pd_load_some(gate + i, some);
        pd_vector y = some == PD_LANES ? pd_load(up + i) : pd_load_some(up + i, some);
        pd_vector power = x * pd_all(-1.44269504f);
        power = pd_select(power > high, high, pd_select(power < low, low, power));
        x = x / (one + pd_exp2(power)) * y;
        memcpy(to + i, &x, (size_t)some * sizeof(float));
    }
}

/* --- phases: all threads call them, each does its share; a barrier ends each --- */

static void norm_phase(struct step *step, int thread, int count, const float *weight) {
    const pd_model *model = step->input->model;
    size_t size = (size_t)model->hidden;
    int threads = step->team->threads, stop = share_start(count, thread + 1, threads);
    for (int i = share_start(count, thread, threads); i < stop; i++)
        normalise(step->hidden + (size_t)i * size, weight, model->hidden, model->epsilon,
                  step->narrow + (size_t)i * size);
    await_all(step->team);
}

static void linear_phase(struct step *step, int thread, int count, const pd_linear *linear,
                         float *to, int adds) {
    int threads = step->team->threads;
    if (pd_prepared_bytes(linear, count)) {
        pd_prepare(linear, step->narrow, linear->in, count, step->prepared, thread, threads);
        await_all(step->team);
    }
    pd_linear_run(linear, step->prepared, step->narrow, linear->in, count, to, linear->out, adds,
                  thread, threads);
    await_all(step->team);
}

static void heads_phase(struct step *step, int thread, int index) {
    int threads = step->team->threads;
    int stop = share_start(step->token_count, thread + 1, threads);
    for (int i = share_start(step->token_count, thread, threads); i < stop; i++)
        place_heads(step, index, i);
    await_all(step->team);
}

static void attention_phase(struct step *step, int thread, int index, int is_last) {
    const pd_step_input *input = step->input;
    const pd_model *model = input->model;
    size_t token_bytes =
        (size_t)model->kv_head_count * (size_t)model->head_dim * (model->keeps_half ? 2 : 4);
    size_t layer_bytes =
        2 * (size_t)input->pool_blocks * (size_t)model->block_tokens * token_bytes;
    if (thread == 0 && input->on_layer != NULL && input->on_layer(index)) step->status = PD_STOPPED;
    if (thread == 0 && is_last && step->wanted_count < step->token_count)
        for (int i = 0; i < step->wanted_count; i++) /* never before its own place */
            memmove(step->hidden + (size_t)i * (size_t)model->hidden,
                    step->hidden + (size_t)step->wanted[i] * (size_t)model->hidden,
                    (size_t)model->hidden * sizeof(float));
    for (;;) {
        int i = atomic_fetch_add_explicit(&step->team->taken, 1, memory_order_relaxed);
        if (i >= step->span_count[is_last]) break;
        pd_attend(model, &step->spans[is_last][i], model->layers[index].window,
                  input->pool + (size_t)index * layer_bytes, step->wide, step->narrow,
                  step->scratch + (size_t)thread * step->scratch_bytes);
    }
    await_all(step->team);
    if (thread == 0) atomic_store(&step->team->taken, 0); /* barriers lie before the next use */
}

static void activation_phase(struct step *step, int thread, int count) {
    enum { PART = 512 };
    int middle = step->input->model->middle, parts = (middle + PART - 1) / PART;
    int threads = step->team->threads, stop = share_start(count * parts, thread + 1, threads);
    for (int i = share_start(count * parts, thread, threads); i < stop; i++) {
        size_t row = (size_t)(i / parts) * (size_t)middle;
        int at = i % parts * PART, size = middle - at < PART ? middle - at : PART;
        const float *gate = step->wide + 2 * row + at;
        activate(gate, gate + middle, size, step->narrow + row + at);
    }
    await_all(step->team);
}

static void walk(struct step *step, int thread) {
    const pd_step_input *input = step->input;
    const pd_model *model = input->model;
    int count = step->token_count, threads = step->team->threads;
    int stop = share_start(count, thread + 1, threads);
    for (int i = share_start(count, thread, threads); i < stop; i++)
        embed(model, input->tokens[i], step->hidden + (size_t)i * (size_t)model->hidden);
    await_all(step->team);
    for (int index = 0; index < model->layer_count; index++) {
        const pd_layer *layer = &model->layers[index];
        int is_last = index == model->layer_count - 1;
        norm_phase(step, thread, count, layer->input_norm);
        linear_phase(step, thread, count, layer->qkv, step->wide, 0);
        heads_phase(step, thread, index);
        attention_phase(step, thread, index, is_last);
        if (step->status != PD_DONE) return;
        if (is_last) count = step->wanted_count; /* nobody reads the others */
        if (count == 0) return;
        linear_phase(step, thread, count, layer->output, step->hidden, 1);
        norm_phase(step, thread, count, layer->mlp_norm);
        linear_phase(step, thread, count, layer->gate_up, step->wide, 0);
        activation_phase(step, thread, count);
        linear_phase(step, thread, count, layer->down, step->hidden, 1);
    }
    norm_phase(step, thread, count, model->norm);
    linear_phase(step, thread, count, model->head, input->logits, 0);
}
