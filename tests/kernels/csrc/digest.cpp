// Every kernel on fixed pseudo-random inputs, one line "ISA OP HASH" each: two machines that agree on all lines computed
// the same bits. NaNs count as one value (their payload is the processor's own). Used by `make check-neon`, which runs
// this for another processor under an emulator; no Python, no torch.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "context.h"
#include "isa.h"

using namespace nvfp4;

namespace {

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  // Mostly -2 .. 2; with `hard`, one in 64 is zero, subnormal, huge, infinite or NaN.
  float value(bool hard) {
    const float v = static_cast<float>(static_cast<int>(next() % 4001) - 2000) / 1000.f;
    if (!hard || next() % 64) return v;
    const float special[] = {0.f, -0.f, v * 1e-40f, v * 1e30f, v > 0 ? __builtin_inff() : -__builtin_inff(), __builtin_nanf("")};
    return special[next() % 6];
  }
};

// `count` values stored as `type`: float bits cut to bfloat16; FP16 and E4M3 as random finite patterns.
std::vector<uint8_t> values(Random& random, size_t count, Type type, bool hard = false) {
  std::vector<uint8_t> out(count * type_bytes(type));
  for (size_t i = 0; i < count; i++) {
    const float v = random.value(hard);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (type == Type::f32) std::memcpy(&out[4 * i], &bits, 4);
    if (type == Type::bf16 || type == Type::fp16) {
      const uint16_t half = static_cast<uint16_t>(type == Type::bf16 ? bits >> 16 : (random.next() & 0x8fff) | 0x2000);
      std::memcpy(&out[2 * i], &half, 2);
    }
    if (type == Type::e4m3) out[i] = static_cast<uint8_t>(random.next() % 0x7f | (random.next() & 0x80));
  }
  return out;
}

uint64_t hash(const std::vector<uint8_t>& data, Type type, uint64_t h = 14695981039346656037u) {
  const size_t size = type_bytes(type);
  for (size_t i = 0; i < data.size(); i += size) {
    uint32_t v = 0;
    std::memcpy(&v, &data[i], size);
    if (type == Type::f32 && (v & 0x7fffffff) > 0x7f800000) v = 0x7fc00000;
    if (type == Type::bf16 && (v & 0x7fff) > 0x7f80) v = 0x7fc0;
    if (type == Type::e4m3 && (v & 0x7f) == 0x7f) v = 0x7f;
    h = (h ^ v) * 1099511628211u;
  }
  return h;
}

const char* name(Type t) {
  const char* names[] = {"f32", "bf16", "fp16", "e4m3"};
  return names[static_cast<int>(t)];
}

void report(Context& c, const std::string& op, uint64_t h) {
  std::printf("%s %s %016llx\n", c.isa(), op.c_str(), static_cast<unsigned long long>(h));
}

void linear_nvfp4(Context& c, Numerics numerics, int m, int n, int k, Type type, Type out_type, bool hard) {
  const float input_scale = numerics == Numerics::w4a4 ? 0.0017f : 0.f;
  Random random{static_cast<uint64_t>(m + 31 * n + 97 * k)};
  std::vector<uint8_t> codes(static_cast<size_t>(n) * k / 2), scales(static_cast<size_t>(n) * k / 16);
  for (auto& b : codes) b = static_cast<uint8_t>(random.next());
  for (auto& b : scales) b = static_cast<uint8_t>(random.next() % 0x7f | (random.next() & 0x80));
  std::vector<float> row_scale(n), bias(n);
  for (int i = 0; i < n; i++) row_scale[i] = 1e-3f * static_cast<float>(1 + i % 5), bias[i] = random.value(false);
  const auto w = c.pack({{codes.data(), scales.data(), n}}, row_scale.data(), m % 2 ? bias.data() : nullptr, k, numerics,
                        input_scale, false);
  const auto x = values(random, static_cast<size_t>(m) * k, type, hard);
  std::vector<uint8_t> out(static_cast<size_t>(m) * n * type_bytes(out_type));
  c.linear_nvfp4(*w, x.data(), type, m, out.data(), out_type);
  const char* names[] = {"w4a16", "w4a8", "w4a4"};
  report(c, std::string("nvfp4-") + names[static_cast<int>(numerics)] + "-" + name(type) + "-" + name(out_type) + "-" +
             std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k), hash(out, out_type));
}

void linear_plain(Context& c, int m, int n, int k, Type w_type, Type type) {
  Random random{static_cast<uint64_t>(m + n + k)};
  const auto w = values(random, static_cast<size_t>(n) * k, w_type), x = values(random, static_cast<size_t>(m) * k, type);
  std::vector<uint8_t> out(static_cast<size_t>(m) * n * 4);
  const float scale = 0.25f;
  LinearPlain a{};
  a.weights = w.data();
  a.weight_type = w_type;
  a.scale = w_type == Type::e4m3 ? &scale : nullptr;
  a.scale_rows = n;
  a.scale_k = k;
  a.n = n;
  a.k = k;
  c.linear_plain(a, x.data(), type, m, out.data(), Type::f32);
  report(c, std::string("plain-") + name(w_type) + "-" + name(type) + "-" + std::to_string(m) + "x" + std::to_string(n) +
             "x" + std::to_string(k), hash(out, Type::f32));
}

void rows(Context& c, int width, Type type, Type out_type, Type weight_type) {
  Random random{static_cast<uint64_t>(width)};
  const int t = 5;
  const auto x = values(random, static_cast<size_t>(t) * 2 * width, type, true), w = values(random, width, weight_type);
  auto residual = values(random, static_cast<size_t>(t) * width, type);
  std::vector<uint8_t> out(static_cast<size_t>(t) * width * type_bytes(out_type));
  c.rms_norm({x.data(), residual.data(), w.data(), weight_type, out.data(), type, out_type, width, 1e-5f}, t);
  const std::string what = std::string("-") + name(type) + "-" + name(out_type) + "-" + std::to_string(width);
  report(c, "rms_norm" + what, hash(residual, type, hash(out, out_type)));
  c.silu_mul({x.data(), out.data(), type, out_type, width}, t);
  report(c, "silu_mul" + what, hash(out, out_type));
}

void rope_and_attention(Context& c, int heads, int kv_heads, int d, int rotary, Type type, Type kv_type, int window) {
  Random random{static_cast<uint64_t>(heads * d + rotary)};
  const int block_size = 5, blocks = 30, length = 117, fresh = 70, positions = 128;
  const size_t cache = static_cast<size_t>(blocks) * kv_heads * block_size * d;
  const auto qkv = values(random, static_cast<size_t>(fresh) * (heads + 2 * kv_heads) * d, type);
  auto k = values(random, cache, kv_type), v = values(random, cache, kv_type);
  std::vector<float> cos(static_cast<size_t>(positions) * (rotary / 2) + 1), sin(cos.size());
  for (size_t i = 0; i < cos.size(); i++) cos[i] = random.value(false) / 2, sin[i] = random.value(false) / 2;
  const auto norm = values(random, d, Type::bf16);
  std::vector<int64_t> at(fresh), slots(fresh);
  std::vector<int32_t> table((length + block_size - 1) / block_size);
  for (size_t i = 0; i < table.size(); i++) table[i] = static_cast<int32_t>((7 * i + 3) % blocks);  // 7: prime to 30
  for (int i = 0; i < fresh; i++) {
    at[i] = length - fresh + i;
    slots[i] = table[at[i] / block_size] * block_size + at[i] % block_size;
  }
  std::vector<uint8_t> q(static_cast<size_t>(fresh) * heads * d * type_bytes(type)), out(q.size());
  const float k_scale = kv_type == Type::e4m3 ? .0625f : 1.f;
  c.rope({qkv.data(), type, at.data(), cos.data(), sin.data(), norm.data(), norm.data(), Type::bf16, 1e-6f, q.data(), k.data(),
          v.data(), kv_type, k_scale, k_scale, slots.data(), heads, kv_heads, d, rotary, block_size},
         fresh, blocks * block_size, positions);
  const std::string what = std::string("-") + name(type) + "-" + name(kv_type) + "-" + std::to_string(d);
  report(c, "rope" + what, hash(v, kv_type, hash(k, kv_type, hash(q, type))));
  const int32_t bounds[] = {0, fresh}, lengths[] = {length};
  Attention a{q.data(), type, out.data(), type, k.data(), v.data(), kv_type, k_scale, k_scale, .2f, table.data(),
              static_cast<int>(table.size()), heads, kv_heads, d, block_size, window, nullptr};
  c.attention(a, bounds, lengths, 1, fresh, blocks);
  report(c, "attention" + what, hash(out, type));
}

}  // namespace

int main() {
  const Type f32 = Type::f32, bf16 = Type::bf16;
  for (const auto& isa : supported_isas()) {
    Context c(2, isa);
    const int shapes[][3] = {{1, 16, 16}, {2, 17, 32}, {3, 40, 48}, {4, 33, 80}, {5, 64, 112}, {37, 50, 592}};
    for (const auto& s : shapes) {
      for (const Numerics numerics : {Numerics::w4a16, Numerics::w4a8, Numerics::w4a4}) {
        linear_nvfp4(c, numerics, s[0], s[1], s[2], bf16, f32, false);
        linear_nvfp4(c, numerics, s[0], s[1], s[2], f32, bf16, true);
      }
      for (const Type w : {bf16, Type::fp16, f32, Type::e4m3}) linear_plain(c, s[0], s[1], s[2] + 3, w, s[0] % 2 ? bf16 : f32);
    }
    for (const int width : {1, 16, 40, 131}) {
      rows(c, width, f32, bf16, Type::fp16);
      rows(c, width, bf16, f32, bf16);
    }
    for (const Type kv : {bf16, f32, Type::e4m3}) {
      rope_and_attention(c, 4, 2, 64, 64, f32, kv, 0);
      rope_and_attention(c, 3, 1, 24, 20, bf16, kv, 50);
    }
  }
}
