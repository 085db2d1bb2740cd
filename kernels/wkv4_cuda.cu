// WKV-4 on an NVIDIA GPU, compiled by NVRTC. wkv4_cuda.py defines what cuda_numbers.h asks for, and the sizes of
// tiles; cuda_tiles.h has what threads, warps and blocks of them work on.
//
// Symbols: N sequences of tokens laid end to end, C channels, S pieces that each sequence is cut into.
//
// A block of threads has the channels of a warp, of one piece, and walks its time in tiles. A tile is read from memory
// once, into registers: warp i holds its i-th STEPS tokens. Each warp adds up its own, they tell each other the sums,
// and each computes its results from its true start. The backward pass does the same again from the states that the
// forward pass kept, and then for adjoints, from last to first. So keys and values are read once and outputs written
// once; backwards, keys, values and the outputs' gradients are read once and two gradients written once.
//
// Where whole sequences would not fill the GPU (`is_cut` in wkv4_cuda.py), each tile is a piece of its own, with a
// block of threads of its own, which tells the others what it adds up to and waits for what those before it say
// (Merrill and Garland 2016, "Single-pass parallel prefix scan with decoupled look-back"). It relies on GPUs beginning
// blocks in the order of their numbers. So there, too, everything is read once.
//
// Most of the time goes into arithmetic. So the tokens of a warp share one exponent where their keys allow it, which
// takes half of it; then a token's last bits may depend on those beside it and after it.
//
// Results depend on nothing but the arguments: every sum has a fixed order.

#include "cuda_numbers.h"
#include "cuda_tiles.h"

namespace wkv4 {

// What is before a piece, in the order of a pass, where its place is `rank`. Pieces make groups, of one for each warp:
// the last one of a group tells what is after it, the others only what they add up to. `first` is what is before the
// first group, `sum` what this piece adds up to, known to warp `teller`, and join(before, run) what is after a piece
// that adds up to `run`. Each warp listens to one other piece.
template <class Plan, class Join>
WKV_INLINE Item look_back(const Strand& strand, int rank, const Item& first, const Item& sum, int teller,
                          Exchange<Plan::WARPS>& exchange, const Join& join) {
    constexpr int LAST = Plan::WARPS - 1;
    const int others = rank % Plan::WARPS, group = rank - others;
    const bool tells = strand.warp == teller && rank + 1 < strand.pieces;
    if (tells && others < LAST) strand.tell(rank, sum);

    Item heard = first;
    const int other = strand.warp == LAST ? group - 1 : strand.warp < others ? group + strand.warp : -1;
    if (other >= 0) {
        do heard = strand.hear(other);
        while (!strand.is_there(heard));
    }
    const Board<Plan::WARPS>& runs = exchange.publish(heard, strand);
    Item before = runs[LAST][strand.lane];
#pragma unroll
    for (int i = 0; i < LAST; ++i) {
        if (i < others) before = join(before, runs[i][strand.lane]);
    }
    if (tells && others == LAST) strand.tell(rank, join(before, sum));
    return before;
}

// From the state before a warp's tokens. Those of the next tile, if there is `more`, are asked for as soon as these
// are done with.
template <bool LEVEL, class Plan, class Tile>
WKV_INLINE void write_outputs(Tile& tile, State<Real> s, Element* y, bool more) {
#pragma unroll
    for (int i = 0; i < Plan::STEPS; ++i) {
        const State<Real> before = s;
        const Weights<Real> weights = tile.template advance<LEVEL>(s, i);
        const Real v = tile.value(i);
        tile.write(y, i, LEVEL ? output_level(before, weights.now, tile.strand.lead, v) : output(before, weights, v));
        if (more) tile.fetch(i);
    }
}

// One tile of the forward pass; `carry` moves from before it to after it.
template <class Plan, class Tile>
WKV_INLINE void forward_tile(Tile& tile, State<Real>& carry, Exchange<Plan::WARPS>& exchange, bool more) {
    const Strand& strand = tile.strand;
    const Arguments& all = strand.all;
    const Board<Plan::WARPS>& runs = tile.publish(exchange);
    State<Real> s;
    if (Plan::CUT) {
        State<Real> before = empty<Real>();
        tile.enter(before, runs);
        constexpr int LAST = Plan::WARPS - 1;
        State<Real> sum;
        if (strand.warp == LAST) sum = tile.after_warp(before, LAST, runs);
        const auto after = [&](const Item& past, const Item& run) {
            return join(past, strand.w * float(Plan::TOKENS), run);
        };
        carry = look_back<Plan>(strand, strand.piece, carry, sum, LAST, exchange, after);
        tile.forget();
        s = join(carry, strand.w * float(tile.first), before);
        if (strand.closing()) carry = join(carry, strand.w * float(tile.tokens), sum);  // of the last warp
    } else {
#pragma unroll
        for (int i = 0; i < Plan::WARPS; ++i) {
            if (i == strand.warp) s = carry;
            carry = tile.after_warp(carry, i, runs);
        }
    }
    if (all.tiles && tile.t % TILE == 0 && tile.count > 0) strand.set_state(all.tiles, strand.tile(tile.t), s);
    Element* y = strand.at(all.output, tile.t);
    if (more) tile.move(Plan::TOKENS);
    if (tile.settle(s)) write_outputs<true, Plan>(tile, s, y, more);
    else write_outputs<false, Plan>(tile, s, y, more);
}

// Outputs of a piece.
template <class Plan> WKV_INLINE void forward(const Arguments& all) {
    __shared__ Board<Plan::WARPS> shared[3];
    Exchange<Plan::WARPS> exchange(shared);
    const Strand strand(all, blockIdx.x, blockIdx.y, Plan::CUT ? Plan::TOKENS : 0);
    if (strand.from >= strand.to && !strand.opening()) return;

    State<Real> carry = empty<Real>();
    if (strand.piece < Plan::WARPS) carry = strand.initial();  // otherwise others tell
    int t = strand.from;
    if (t + Plan::TOKENS <= strand.to) {
        Share<true, Plan> tile(strand, t);
        if (Plan::CUT) tile.prefetch(all.ahead);
        for (; t + Plan::TOKENS <= strand.to; t += Plan::TOKENS) {
            forward_tile<Plan>(tile, carry, exchange, !Plan::CUT && t + 2 * Plan::TOKENS <= strand.to);
        }
    }
    if (t < strand.to) {
        Share<false, Plan> tile(strand, t);
        forward_tile<Plan>(tile, carry, exchange, false);
    }
    if (strand.warp == Plan::WARPS - 1 && strand.closing()) {
        carry.p = carry.p * (1 / LOG2E);
        strand.set_state(all.final_state, strand.sequence,
                         strand.time > 0 ? carry : strand.state(all.state, strand.sequence));
    }
}

// The adjoint before a run, of which `run` is (a, b) if the adjoint after it is 0, and what is left of that one.
WKV_INLINE Item link(const Item& after, const Item& run) {
    const Adjoint<Real> before = join(Adjoint<Real>{run.a, run.b}, run.p, Adjoint<Real>{after.a, after.b});
    return {before.a, before.b, run.p * after.p};
}

// The adjoint before a warp's tokens if that after them is 0. Keeps the states before each; s moves to that after all.
template <bool LEVEL, class Plan, class Tile>
WKV_INLINE Adjoint<Real> adjoint_before(const Tile& tile, State<Real>& s, State<Real> (&before)[Plan::STEPS]) {
#pragma unroll
    for (int i = 0; i < Plan::STEPS; ++i) {
        before[i] = s;
        tile.template advance<LEVEL>(s, i);
    }
    Adjoint<Real> adjoint{Real{}, Real{}};
#pragma unroll
    for (int i = Plan::STEPS - 1; i >= 0; --i) {
        Real p = before[i].p;
        tile.retire(adjoint, before[i], tile.template weigh<LEVEL>(i, p), i, tile.grad(i));
    }
    return adjoint;
}

// From the adjoint after a warp's tokens; adds up the gradients of u and w. The states' exponents begin with p.
template <bool LEVEL, class Plan, class Tile>
WKV_INLINE void write_gradients(Tile& tile, const State<Real> (&before)[Plan::STEPS], Real p, Adjoint<Real> adjoint,
                                Element* gk, Element* gv, Item& sums, bool more) {
    Real exponents[Plan::STEPS];
    tile.template follow<LEVEL>(p, exponents);
#pragma unroll
    for (int i = Plan::STEPS - 1; i >= 0; --i) {
        const Weights<Real> weights = tile.template weigh<LEVEL>(i, exponents[i]);
        const Gradient<Real> gradient = differentiate(before[i], weights, tile.value(i), tile.grad(i), adjoint);
        tile.write(gk, i, gradient.key);
        tile.write(gv, i, gradient.value);
        sums.a = sums.a + select_(tile.has(i), gradient.first, Real{});
        sums.b = sums.b + select_(tile.has(i), weights.past * gradient.decay, Real{});
        tile.retire(adjoint, before[i], weights, i, tile.grad(i));
        if (more) tile.fetch(i);
    }
}

// One tile of the backward pass; as in the forward pass, those of the next one are asked for.
template <class Plan, class Tile>
WKV_INLINE void backward_tile(Tile& tile, Item& carry, Exchange<Plan::WARPS>& exchange, Item& sums, bool more) {
    static_assert(Plan::TOKENS == TILE, "a tile must begin with a kept state");
    constexpr int STEPS = Plan::STEPS;
    const Strand& strand = tile.strand;
    const Arguments& all = strand.all;
    State<Real> s = strand.state(all.tiles, strand.tile(tile.t)), before[STEPS];
    const Board<Plan::WARPS>& states = tile.publish(exchange);
    tile.enter(s, states);
    // The exponents before and after this warp's tokens, as other warps have them.
    const Real opened = s.p, closed = tile.after_warp(s, strand.warp, states).p;
    const bool level = tile.settle(s);
    const Real first = s.p, entered = exp_(opened - first);
    Adjoint<Real> adjoint =
        level ? adjoint_before<true, Plan>(tile, s, before) : adjoint_before<false, Plan>(tile, s, before);
    const Real left = exp_(s.p - closed);
    // What these tokens add to the adjoint, and what they leave of it.
    const Item run{adjoint.a * entered, adjoint.b * entered, exp_(opened + strand.w * float(tile.count) - closed)};
    const Board<Plan::WARPS>& runs = exchange.publish(run, strand);
    if (Plan::CUT) {
        Item after{Real{}, Real{}, Real{} + 1};
#pragma unroll
        for (int i = Plan::WARPS - 1; i >= 0; --i) {
            if (i > strand.warp) after = link(after, runs[i][strand.lane]);
        }
        Item sum;
        if (strand.warp == 0) sum = link(after, runs[0][strand.lane]);
        carry = look_back<Plan>(strand, strand.rank(), carry, sum, 0, exchange, link);
        tile.forget();
        after = link(carry, after);
        adjoint = {after.a, after.b};
        carry = link(carry, sum);  // of the first warp
    } else {
#pragma unroll
        for (int i = Plan::WARPS - 1; i >= 0; --i) {
            if (i == strand.warp) adjoint = {carry.a, carry.b};
            carry = link(carry, runs[i][strand.lane]);
        }
    }

    Element *gk = strand.at(all.grad_key, tile.t), *gv = strand.at(all.grad_value, tile.t);
    if (more) tile.move(-Plan::TOKENS);
    adjoint = {adjoint.a * left, adjoint.b * left};
    if (level) write_gradients<true, Plan>(tile, before, first, adjoint, gk, gv, sums, more);
    else write_gradients<false, Plan>(tile, before, first, adjoint, gk, gv, sums, more);
}

// Gradients of a piece.
template <class Plan> WKV_INLINE void backward(const Arguments& all) {
    __shared__ Board<Plan::WARPS> shared[3];
    Exchange<Plan::WARPS> exchange(shared);
    const int last = gridDim.x - 1, last_piece = gridDim.y - 1;
    const Strand strand(all, last - blockIdx.x, last_piece - blockIdx.y, Plan::CUT ? Plan::TOKENS : 0);

    Item carry{Real{}, Real{}, Real{}}, sums = carry;
    if (strand.rank() < Plan::WARPS) carry = strand.state(all.grad_state, strand.sequence);  // otherwise others tell
    for (int t = strand.to; t > strand.from;) {
        const int rest = (t - strand.from) % Plan::TOKENS;
        if (rest > 0) {
            t -= rest;
            Share<false, Plan> tile(strand, t);
            backward_tile<Plan>(tile, carry, exchange, sums, false);
        } else {
            Share<true, Plan> tile(strand, t - Plan::TOKENS);
            if (Plan::CUT) tile.prefetch(-all.ahead);
            for (; t > strand.from; t -= Plan::TOKENS) {
                backward_tile<Plan>(tile, carry, exchange, sums, !Plan::CUT && t - Plan::TOKENS > strand.from);
            }
        }
    }
    const Board<Plan::WARPS>& parts = exchange.publish(sums, strand);
    if (strand.warp > 0) return;
    for (int i = 1; i < Plan::WARPS; ++i) {
        sums.a = sums.a + parts[i][strand.lane].a;
        sums.b = sums.b + parts[i][strand.lane].b;
    }
    const int this_piece = strand.sequence * all.pieces + strand.piece;
    strand.set_row(all.grad_pieces, 2 * this_piece, sums.a);
    strand.set_row(all.grad_pieces, 2 * this_piece + 1, sums.b * strand.w * (1 / LOG2E));
    if (strand.opening()) {
        const Real b = strand.state(all.state, strand.sequence).b;  // of 0: no history, so no gradient
        if (strand.time > 0) carry = {select_(b == 0, Real{}, carry.a), select_(b == 0, Real{}, carry.b), Real{}};
        strand.set_state(all.grad_initial, strand.sequence, {carry.a, carry.b, Real{}});
    }
}

// The gradients of u and w: sums over all pieces, each thread's first, then those of all warps.
WKV_INLINE void sum_pieces(const Arguments& all) {
    __shared__ float shared[SUM_WARPS][LANES];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int columns = 2 * all.channels, column = min(int(blockIdx.x) * LANES + lane, columns - 1);
    float sum = 0;
#pragma unroll 8
    for (int i = warp; i < all.sequences * all.pieces; i += SUM_WARPS) {
        sum += all.grad_pieces[Int(i) * columns + column];
    }
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
    for (int i = 1; i < SUM_WARPS; ++i) sum += shared[i][lane];
    if (column < all.channels) all.grad_first[column] = sum;
    else all.grad_decay[column - all.channels] = sum;
}

}  // namespace wkv4

#define WKV_KERNEL(name, pass, plan, tensors, cut)                                                  \
    extern "C" __global__ void __launch_bounds__(plan##_WARPS * wkv4::LANES, plan##_BLOCKS)         \
    wkv4_##name(const __grid_constant__ wkv4::Arguments all) {                                      \
        wkv4::pass<wkv4::Plan<tensors, plan##_WARPS, plan##_STEPS, cut>>(all);                      \
    }

WKV_KERNEL(forward, forward, FORWARD, 2, false)
WKV_KERNEL(backward, backward, BACKWARD, 3, false)
WKV_KERNEL(forward_cut, forward, FORWARD_CUT, 2, true)
WKV_KERNEL(backward_cut, backward, BACKWARD_CUT, 3, true)

extern "C" __global__ void __launch_bounds__(SUM_WARPS * wkv4::LANES)
wkv4_sum_pieces(const __grid_constant__ wkv4::Arguments all) {
    wkv4::sum_pieces(all);
}
