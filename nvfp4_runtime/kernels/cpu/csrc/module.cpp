// The binding: addresses and numbers in, nothing out. backend.py has checked shape, dtype, device and contiguity; here
// only the GIL is released. Built without torch and without NumPy.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "context.h"
#include "decoder.h"
#include "isa.h"
#include "limits.h"

namespace nb = nanobind;
using namespace nvfp4;
using namespace nb::literals;

namespace {

using Address = uintptr_t;  // 0: absent

// Raised as nvfp4_runtime.errors.KernelError.
struct Misaligned : std::runtime_error {
  explicit Misaligned(size_t size)
      : std::runtime_error("found a tensor whose address is not a multiple of its element size, expected a multiple of " +
                           std::to_string(size) + "; clone() it before the call") {}
};

template <class T>
T* at(Address a) {
  if (a % alignof(T)) throw Misaligned(alignof(T));
  return reinterpret_cast<T*>(a);
}
void* at(Address a, int type) {
  const size_t size = type_bytes(Type(type));
  if (a % size) throw Misaligned(size);
  return reinterpret_cast<void*>(a);
}

NormWeight norm_weight(const std::tuple<Address, int, float>& w) {
  return {at(std::get<0>(w), std::get<1>(w)), Type(std::get<1>(w)), std::get<2>(w)};
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels. Use nvfp4_runtime.kernels.cpu.backend.CPUBackend, which checks what this does not.";
  m.def("supported_isas", &supported_isas, "ISA variants this machine can run, best first.");

  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const Misaligned& e) {
      PyErr_SetString(nb::module_::import_("nvfp4_runtime.errors").attr("KernelError").ptr(), e.what());
    }
  });

  const nb::call_guard<nb::gil_scoped_release> no_gil;

  nb::class_<Rate>(m, "Rate")
      .def_ro("median", &Rate::median)
      .def_ro("low", &Rate::low)
      .def_ro("high", &Rate::high)
      .def_ro("how", &Rate::how);
  m.def("peak_kinds", &peak_kinds, "What measure_peak can measure on this CPU.");
  m.def("measure_read_bandwidth", &measure_read_bandwidth, nb::arg("threads"), nb::arg("bytes"), nb::arg("seconds"),
        no_gil);
  m.def("measure_peak", &measure_peak, nb::arg("kind"), nb::arg("threads"), nb::arg("seconds"), no_gil);

  nb::class_<Linear>(m, "Linear").def_ro("nbytes", &Linear::bytes);
  nb::class_<PackedNVFP4, Linear>(m, "PackedNVFP4");
  nb::class_<PlainWeight, Linear>(m, "PlainWeight")
      .def("__init__", [](PlainWeight* self, Address weights, int type, Address bias, int n, int k) {
        new (self) PlainWeight(at(weights, type), Type(type), at<const float>(bias), n, k);
      })
      .def("scale_by", [](PlainWeight& self, Address scale, int rows, int columns) {
        self.scale_by(at<const float>(scale), rows, columns);
      });
  nb::class_<ExpertsNVFP4>(m, "ExpertsNVFP4")
      .def(nb::init<std::vector<const PackedNVFP4*>>(), "The caller keeps the weights alive.");
  m.def(
      "find_nan_e4m3", [](Address codes, int64_t count) { return find_nan_e4m3(at<const uint8_t>(codes), count); }, no_gil,
      "Index of the first NaN among E4M3 codes, or -1.");

  nb::class_<Context>(m, "Context")
      .def(nb::init<int, const std::string&>())
      .def_prop_ro("isa", &Context::isa)
      .def_prop_ro("threads", &Context::threads)
      .def_prop_ro("sixteen_bit", &Context::sixteen_bit, "What W4A16 makes of bfloat16 activations.")
      .def(
          "pack_nvfp4",
          [](Context& c, const std::vector<std::tuple<Address, Address, int>>& parts, Address row_scale, Address bias,
             int k, int numerics, float input_scale, bool e8m0) {
            std::vector<NVFP4Rows> rows;
            for (const auto& [codes, scales, n] : parts) rows.push_back({at<const uint8_t>(codes), at<const uint8_t>(scales), n});
            return c.pack(rows, at<const float>(row_scale), at<const float>(bias), k, Numerics(numerics), input_scale,
                          e8m0);
          },
          no_gil, "Parts as (codes, block scales, rows); see packed.h.")
      .def(
          "linear",
          [](Context& c, const Linear& w, Address x, int type, int rows, Address out, int out_type) {
            w.run(c, at(x, type), Type(type), rows, at(out, out_type), Type(out_type));
          },
          no_gil)
      .def(
          "grouped_nvfp4",
          [](Context& c, const ExpertsNVFP4& w, Address x, int type, Address offsets, int rows, Address out,
             int out_type) {
            c.grouped_nvfp4(w, at(x, type), Type(type), at<const int32_t>(offsets), rows, at(out, out_type), Type(out_type));
          },
          no_gil)
      .def(
          "quantize_weight",
          [](Context& c, Address w, int type, int n, int k, Address codes, Address row_amax, Address block_scales,
             float scale_2, int method, Address importance) {
            c.quantize_weight({at(w, type), Type(type), n, k, at<uint8_t>(codes), at<float>(row_amax),
                               at<uint8_t>(block_scales), scale_2, BlockScales(method), at<const float>(importance)});
          },
          no_gil)
      .def(
          "rms_norm",
          [](Context& c, Address x, Address residual, Address weight, int weight_type, Address out, int type,
             int out_type, int rows, int width, float eps) {
            c.rms_norm({at(x, type), at(residual, type), at(weight, weight_type), Type(weight_type), at(out, out_type),
                        Type(type), Type(out_type), width, eps},
                       rows);
          },
          no_gil)
      .def(
          "silu_mul",
          [](Context& c, Address x, Address out, int type, int out_type, int rows, int width) {
            c.silu_mul({at(x, type), at(out, out_type), Type(type), Type(out_type), width}, rows);
          },
          no_gil)
      .def(
          "gated",
          [](Context& c, Address x, Address out, int type, int out_type, int rows, int width, int gate, float alpha,
             float limit) {
            c.silu_mul({at(x, type), at(out, out_type), Type(type), Type(out_type), width, Gate(gate), alpha, limit}, rows);
          },
          no_gil)
      .def(
          "rope",
          [](Context& c, Address qkv, int type, int rows, Address positions, Address cos, Address sin, Address q_norm,
             Address k_norm, int norm_type, float eps, Address q_out, Address k, Address v, int kv_type, float k_scale,
             float v_scale, Address slots, int heads, int kv_heads, int head_dim, int rotary_dim, int block_size,
             int64_t num_slots, int64_t num_positions, Address k_blocks,
             Address v_blocks) {
            c.rope({at(qkv, type), Type(type), at<const int64_t>(positions), at<const float>(cos), at<const float>(sin),
                    at(q_norm, norm_type), at(k_norm, norm_type), Type(norm_type), eps, at(q_out, type), at(k, kv_type),
                    at(v, kv_type), Type(kv_type), k_scale,
                    v_scale, at<const int64_t>(slots), heads, kv_heads, head_dim, rotary_dim, block_size,
                    at<uint8_t>(k_blocks), at<uint8_t>(v_blocks)},
                   rows, num_slots, num_positions);
          },
          no_gil)
      .def(
          "attention",
          [](Context& c, Address q, int type, int rows, Address out, int out_type, Address k, Address v, int kv_type,
             float k_scale, float v_scale, float scale, Address tables, int table_stride, Address cu_seqlens, Address seq_lens,
             int sequences, int heads, int kv_heads, int head_dim, int block_size, int window, int num_blocks,
             Address k_blocks, Address v_blocks, Address sinks) {
            Attention a{at(q, type), Type(type), at(out, out_type), Type(out_type),
                        at(k, kv_type), at(v, kv_type), Type(kv_type),
                        k_scale,  v_scale,      scale,
                        at<const int32_t>(tables), table_stride, heads,
                        kv_heads, head_dim,     block_size,
                        window,   at<const uint8_t>(k_blocks), at<const uint8_t>(v_blocks), at<const float>(sinks)};
            c.attention(a, at<const int32_t>(cu_seqlens), at<const int32_t>(seq_lens), sequences, rows, num_blocks);
          },
          no_gil, "q"_a, "type"_a, "rows"_a, "out"_a, "out_type"_a, "k"_a, "v"_a, "kv_type"_a, "k_scale"_a, "v_scale"_a,
          "scale"_a, "tables"_a, "table_stride"_a, "cu_seqlens"_a, "seq_lens"_a, "sequences"_a, "heads"_a, "kv_heads"_a,
          "head_dim"_a, "block_size"_a, "window"_a, "num_blocks"_a, "k_blocks"_a, "v_blocks"_a, "sinks"_a = 0)
      .def(
          "latent",
          [](Context& c, Address q_nope, Address q_rope, Address cache, int type, Address out, int out_type,
             Address tables, int table_stride, Address seq_lens, int sequences, int heads, int rank, int rope,
             int block_size, int num_blocks, float scale) {
            Latent a{at(q_nope, type), at(q_rope, type), at(cache, type), Type(type), at(out, out_type), Type(out_type),
                     at<const int32_t>(tables), table_stride, at<const int32_t>(seq_lens), heads, rank, rope, block_size,
                     scale, 0};
            c.latent(a, sequences, num_blocks);
          },
          no_gil)
      .def(
          "mamba2",
          [](Context& c, Address xbc, Address dt, int type, Address dt_bias, Address a, float min_step,
             Address conv_weight, Address conv_bias, Address d, Address conv_state, Address ssm_state, Address slots,
             Address positions, Address cu_seqlens, int sequences, int64_t num_slots, int heads, int head_dim, int state,
             int groups, int conv_width, Address out) {
            Mamba2 m{at(xbc, type), at(dt, type), Type(type), at<const float>(dt_bias), at<const float>(a), min_step,
                     at<const float>(conv_weight), at<const float>(conv_bias), at<const float>(d), at<float>(conv_state),
                     at<float>(ssm_state), at<const int64_t>(slots), at<const int64_t>(positions),
                     at<const int32_t>(cu_seqlens), heads, head_dim, state, groups, conv_width, 0, nullptr, nullptr,
                     nullptr, at<float>(out), nullptr};
            c.mamba2(m, sequences, num_slots);
          },
          no_gil)
      .def(
          "gated_delta",
          [](Context& c, Address qkv, Address b, Address dt, int type, Address dt_bias, Address a, Address conv_weight,
             Address conv_bias, Address conv_state, Address state, Address slots, Address positions, Address cu_seqlens,
             int sequences, int64_t num_slots, int value_heads, int value_dim, int key_dim, int key_heads, int conv_width,
             Address out) {
            Mamba2 m{at(qkv, type), at(dt, type), Type(type), at<const float>(dt_bias), at<const float>(a), 0.f,
                     at<const float>(conv_weight), at<const float>(conv_bias), nullptr, at<float>(conv_state),
                     at<float>(state), at<const int64_t>(slots), at<const int64_t>(positions),
                     at<const int32_t>(cu_seqlens), value_heads, value_dim, key_dim, key_heads, conv_width, 0, nullptr,
                     nullptr, nullptr, at<float>(out), at(b, type)};
            c.mamba2(m, sequences, num_slots);
          },
          no_gil)
      .def(
          "quantize_activation",
          [](Context& c, Address x, int type, int rows, int k, float input_scale, Address codes, Address scales) {
            PackX a{};
            a.x = at(x, type);
            a.type = Type(type);
            a.m = rows;
            a.k = k;
            a.input_scale = input_scale;
            c.quantize(a, at<uint8_t>(codes), at<uint8_t>(scales));
          },
          no_gil, "For tests: uint8 [rows, k] codes and e4m3 [rows, k / 16] scales.");

  nb::class_<Decoder>(m, "Decoder")
      .def(
          "__init__",
          [](Decoder* self, Context& context, int hidden, int stream, int input, Address embedding, int embedding_type,
             int64_t vocab, std::tuple<Address, int, float> last_norm) {
            new (self) Decoder(context, hidden, Type(stream), Type(input), {at(embedding, embedding_type), Type(embedding_type), vocab},
                               norm_weight(last_norm));
          },
          nb::keep_alive<1, 2>())
      .def(
          "add",
          [](Decoder& d, std::tuple<Address, int, float> input_norm, std::tuple<Address, int, float> post_norm,
             const Linear& qkv, const Linear& o, const Linear& gate_up, const Linear& down, int stream, int input,
             Address cos, Address sin, int64_t num_positions, Address q_norm, Address k_norm, int norm_type, float eps,
             int heads, int kv_heads, int head_dim, int rotary_dim, float scale, int window) {
            DecoderLayer layer{};
            layer.input_norm = norm_weight(input_norm);
            layer.post_norm = norm_weight(post_norm);
            layer.qkv = &qkv;
            layer.o = &o;
            layer.gate_up = &gate_up;
            layer.down = &down;
            Rope& rope = layer.rope;
            rope.type = Type(stream);
            rope.cos = at<const float>(cos);
            rope.sin = at<const float>(sin);
            rope.q_norm = at(q_norm, norm_type);
            rope.k_norm = at(k_norm, norm_type);
            rope.norm_type = Type(norm_type);
            rope.eps = eps;
            rope.heads = heads;
            rope.kv_heads = kv_heads;
            rope.head_dim = head_dim;
            rope.rotary_dim = rotary_dim;
            Attention& a = layer.attention;
            a.type = Type(stream);
            a.out_type = Type(input);
            a.scale = scale;
            a.heads = heads;
            a.kv_heads = kv_heads;
            a.head_dim = head_dim;
            a.window = window;
            layer.num_positions = num_positions;
            d.add(layer);
          },
          nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>())
      .def("set_cache",
           [](Decoder& d, int i, Address k, Address v, int type, float k_scale, float v_scale, int num_blocks,
              int block_size, Address k_blocks, Address v_blocks) {
             DecoderLayer& layer = d.layer(i);
             layer.attention.k = layer.rope.k = at(k, type);
             layer.attention.v = layer.rope.v = at(v, type);
             layer.rope.kv_type = layer.attention.kv_type = Type(type);
             layer.rope.k_scale = layer.attention.k_scale = k_scale;
             layer.rope.v_scale = layer.attention.v_scale = v_scale;
             layer.rope.block_size = layer.attention.block_size = block_size;
             layer.attention.k_blocks = layer.rope.k_blocks = at<uint8_t>(k_blocks);
             layer.attention.v_blocks = layer.rope.v_blocks = at<uint8_t>(v_blocks);
             layer.num_blocks = num_blocks;
           })
      .def(
          "run",
          [](Decoder& d, Address ids, int rows, Address logits_rows, int wanted, Address out, Address positions,
             Address slots, Address tables, int table_stride, Address cu_seqlens, Address seq_lens, int sequences) {
            d.run({at<const int64_t>(ids), rows, at<const int64_t>(logits_rows), wanted, at(out, int(d.input())),
                   at<const int64_t>(positions), at<const int64_t>(slots), at<const int32_t>(tables),
                   at<const int32_t>(cu_seqlens), at<const int32_t>(seq_lens), table_stride, sequences});
          },
          no_gil);
}
