// The ops as the binding sees them: one context per backend owns the threads, the scratch and the choice of ISA.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed.h"
#include "pool.h"
#include "types.h"

namespace nvfp4 {

static inline size_t type_bytes(Type t) { return t == Type::f32 ? 4 : t == Type::e4m3 || t == Type::nvfp4 ? 1 : 2; }

int64_t find_nan_e4m3(const uint8_t* codes, int64_t count);  // index of the first, or -1

// Experts of one layer, or a head's matrices each: alike in shape, format and numerics. Does not own them.
struct Experts {
  std::vector<const PackedNVFP4*> packed;  // either these
  std::vector<const PlainWeight*> plain;   // or these
  int n = 0, k = 0;
  explicit Experts(const std::vector<const Linear*>& e);  // throws std::invalid_argument when they are not alike
  int count() const { return static_cast<int>(packed.size() + plain.size()); }
};

struct ExpertBlock {
  int expert, block;  // of its rows
};

// Segments begin .. end - 1 of items_[item].
struct AttentionPiece {
  int item, begin, end;
};

class Context {
 public:
  Context(int threads, const std::string& isa);  // throws std::invalid_argument when the machine lacks `isa`

  const char* isa() const { return kernels_.isa; }
  int threads() const { return pool_.threads(); }
  const char* sixteen_bit() const;
  std::unique_lock<std::recursive_mutex> lock() { return std::unique_lock(mutex_); }


  std::unique_ptr<PackedNVFP4> pack(const std::vector<NVFP4Rows>& parts, const float* row_scale, const float* bias,
                                    int k, Numerics numerics, float input_scale, bool e8m0);
  void linear_nvfp4(const PackedNVFP4& w, const void* x, Type type, int m, void* out, Type out_type);
  void convert(const void* from, Type type, void* to, Type to_type, int count);  // on the calling thread
  // Rows offsets[e] .. offsets[e + 1] of x meet expert e. Offsets run from 0 to `rows` and never fall.
  // `same_row`: x is one row, and every expert's only one.
  void grouped(const Experts& w, const void* x, Type type, const int32_t* offsets, int rows, void* out, Type out_type,
               bool same_row = false);
  // `a` names the weight: pointers, types, scales, n, k; the rest is filled in here.
  void linear_plain(LinearPlain a, const void* x, Type type, int m, void* out, Type out_type);
  void quantize_weight(const QuantizeWeight& a);
  void relu_squared(const ReluSquared& a, int rows);
  void route(const Route& a, int rows);
  void weigh(const Weigh& a, int rows);
  void latent_prepare(const LatentPrepare& a, int rows, int64_t num_slots, int64_t num_positions);
  void latent_queries(const LatentQueries& a);
  void rms_norm(const RMSNorm& a, int rows);
  void silu_mul(const SiluMul& a, int rows);
  void rope(const Rope& a, int rows, int64_t num_slots, int64_t num_positions);
  void attention(Attention& a, const int32_t* cu_seqlens, const int32_t* seq_lens, int sequences, int rows,
                 int num_blocks);
  void latent(Latent& a, int sequences, int num_blocks);
  void mamba2(Mamba2& a, int sequences, int64_t num_slots);  // its scratch is filled in here
  void quantize(const PackX& a, uint8_t* codes, uint8_t* scales);

 private:
  Operand operand_of(const PackedNVFP4& w, Type type) const;
  // How `count` panels or groups of 16 outputs are cut. `few`: rows of x so few that the kernel reads `side_by_side` of them
  // at once, each from its own part of a piece.
  Pieces weight_pieces(int count, size_t unit_bytes, bool few, int side_by_side) const;
  void grouped_nvfp4(const std::vector<const PackedNVFP4*>& w, const void* x, Type type, const int32_t* offsets, void* out,
                     Type out_type, bool same_row);
  void grouped_plain(const std::vector<const PlainWeight*>& w, const void* x, Type type, const int32_t* offsets, void* out,
                     Type out_type, bool same_row);
  int plan_attention(const Attention& a, const int32_t* cu_seqlens, const int32_t* seq_lens, int sequences);

  const Kernels& kernels_;
  const bool ask_;  // LinearNVFP4::ask
  Pool pool_;
  std::recursive_mutex mutex_;  // a decoder holds it over the ops it calls
  Arena arena_;
  Scratch x_;
  std::vector<Scratch> per_thread_;
  std::vector<float*> addresses_;  // of per_thread_
  Scratch partials_;
  std::vector<AttentionItem> items_;
  std::vector<PackX> expert_packs_;  // of the experts that have rows
  std::vector<LinearNVFP4> expert_linears_;
  std::vector<PackPlain> plain_packs_;
  std::vector<LinearPlain> plain_linears_;
  std::vector<ExpertBlock> expert_blocks_;
  std::vector<AttentionPiece> pieces_;
  std::unique_ptr<std::atomic<int>[]> pending_;  // per item: pieces not yet done
  size_t pending_size_ = 0;
};

}  // namespace nvfp4
