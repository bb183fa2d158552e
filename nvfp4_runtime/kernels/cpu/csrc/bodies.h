// The bodies of a decoder's blocks. Linears, mixtures and the like are kept alive by the caller.
#pragma once
#include "decoder.h"
#include "latent_layer.h"
#include "mixture.h"

namespace nvfp4 {

// Fields that a step or a cache sets (activations, positions, tables, blocks) are left empty by whoever makes one.
struct AttentionBody final : Body {
  const Linear &qkv, &o;
  Rope rope{};
  Attention attention{};
  int64_t num_positions = 0;
  int num_blocks = 0;
  AttentionBody(Context& c, Type s, Type i, const Linear& qkv_in, const Linear& o_in) : Body(c, s, i), qkv(qkv_in), o(o_in) {}
  void run(const DecoderStep& step, const void* normed, void* out) override;

 private:
  Scratch wide_, queries_, attended_;
};

// A feed-forward: gate and up joined with their gate, or up with relu(x)^2.
struct FeedForward final : Body {
  const Linear &up, &down;
  const bool gated;
  SiluMul activation{};  // of a gated one
  FeedForward(Context& c, Type s, Type i, const Linear& up_in, const Linear& down_in, bool gated_in);
  void run(const DecoderStep& step, const void* normed, void* out) override { run_rows(step.rows, normed, out); }
  void run_rows(int rows, const void* normed, void* out);

 private:
  Scratch wide_, inner_;
};

struct MixtureBody final : Body {
  Mixture& mixture;
  FeedForward* shared;       // or null
  const Linear* gate;        // of the shared one, or null
  MixtureBody(Context& c, Mixture& m, FeedForward* shared_in, const Linear* gate_in)
      : Body(c, m.stream(), m.input()), mixture(m), shared(shared_in), gate(gate_in) {}
  void run(const DecoderStep& step, const void* normed, void* out) override;

 private:
  Scratch shared_, gate_;
};

struct LatentBody final : Body {
  const Linear &first, &o;
  LatentLayer& layer;
  void* cache = nullptr;
  int block_size = 0, num_blocks = 0;
  LatentBody(Context& c, LatentLayer& l, const Linear& first_in, const Linear& o_in)
      : Body(c, l.stream(), l.input()), first(first_in), o(o_in), layer(l) {}
  // Every sequence decodes one token.
  void run(const DecoderStep& step, const void* normed, void* out) override;

 private:
  Scratch projected_, attended_;
};

struct MambaBody final : Body {
  const Linear &in, &out_proj;
  Mamba2 mamba{};
  int64_t num_slots = 0;
  MambaBody(Context& c, Type s, Type i, const Linear& in_proj, const Linear& out_in) : Body(c, s, i), in(in_proj), out_proj(out_in) {}
  void run(const DecoderStep& step, const void* normed, void* out) override;

 private:
  Scratch projected_, mixed_;
};

}  // namespace nvfp4
