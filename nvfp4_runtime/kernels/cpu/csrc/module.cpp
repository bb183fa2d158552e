// The binding: addresses and numbers in, nothing out. backend.py has checked shape, dtype, device and contiguity; here
// only the GIL is released. Built without torch and without NumPy.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "context.h"
#include "binding.h"
#include "isa.h"
#include "limits.h"

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
  nb::class_<Experts>(m, "Experts").def(nb::init<const std::vector<const Linear*>&>(), "The caller keeps the weights alive.");
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
          "grouped",
          [](Context& c, const Experts& w, Address x, int type, Address offsets, int rows, Address out, int out_type) {
            c.grouped(w, at(x, type), Type(type), at<const int32_t>(offsets), rows, at(out, out_type), Type(out_type));
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
          "relu_squared",
          [](Context& c, Address x, Address out, int type, int out_type, int rows, int width) {
            c.relu_squared({at(x, type), at(out, out_type), Type(type), Type(out_type), width}, rows);
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
          [](Context& c, Address projected, int type, Address dt_bias, Address a, float min_step, Address conv_weight,
             Address conv_bias, Address d, Address norm, float eps, Address conv_state, Address ssm_state, Address slots,
             Address positions, Address cu_seqlens, int sequences, int64_t num_slots, int heads, int head_dim, int state,
             int groups, int conv_width, Address out, int out_type) {
            Mamba2 m{};
            m.type = Type(type);
            m.split(at(projected, type), heads, head_dim, state, groups);
            m.dt_bias = at<const float>(dt_bias);
            m.a = at<const float>(a);
            m.min_step = min_step;
            m.conv_weight = at<const float>(conv_weight);
            m.conv_bias = at<const float>(conv_bias);
            m.d = at<const float>(d);
            m.norm = at<const float>(norm);
            m.eps = eps;
            m.conv_state = at<float>(conv_state);
            m.ssm_state = at<float>(ssm_state);
            m.slots = at<const int64_t>(slots);
            m.positions = at<const int64_t>(positions);
            m.cu_seqlens = at<const int32_t>(cu_seqlens);
            m.conv_width = conv_width;
            m.out = at(out, out_type);
            m.out_type = Type(out_type);
            c.mamba2(m, sequences, num_slots);
          },
          no_gil)
      .def(
          "gated_delta",
          [](Context& c, Address qkv, Address b, Address dt, int type, Address dt_bias, Address a, Address conv_weight,
             Address conv_bias, Address conv_state, Address state, Address slots, Address positions, Address cu_seqlens,
             int sequences, int64_t num_slots, int value_heads, int value_dim, int key_dim, int key_heads, int conv_width,
             Address out) {
            Mamba2 m{};
            m.type = Type(type);
            m.heads = value_heads;
            m.head_dim = value_dim;
            m.state = key_dim;
            m.groups = key_heads;
            m.xbc = at(qkv, type);
            m.xbc_row = static_cast<size_t>(m.conv_dim());
            m.dt = at(dt, type);
            m.dt_row = static_cast<size_t>(m.heads);
            m.b = at(b, type);
            m.dt_bias = at<const float>(dt_bias);
            m.a = at<const float>(a);
            m.conv_weight = at<const float>(conv_weight);
            m.conv_bias = at<const float>(conv_bias);
            m.conv_state = at<float>(conv_state);
            m.ssm_state = at<float>(state);
            m.slots = at<const int64_t>(slots);
            m.positions = at<const int64_t>(positions);
            m.cu_seqlens = at<const int32_t>(cu_seqlens);
            m.conv_width = conv_width;
            m.y = at<float>(out);
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

  nb::class_<Mixture>(m, "Mixture")
      .def(
          "__init__",
          [](Mixture* self, Context& context, const Linear& router, Address correction, int experts, int top_k, int groups,
             int top_groups, bool softmax, bool renormalise, float scale, const Experts& first, const Experts& down, bool gated,
             std::tuple<int, float, float> gate, int stream, int input) {
            Route route{};
            route.correction = at<const float>(correction);
            route.experts = experts;
            route.top_k = top_k;
            route.groups = groups;
            route.top_groups = top_groups;
            route.softmax = softmax;
            route.renormalise = renormalise;
            route.scale = scale;
            SiluMul activation{};
            activation.type = Type(stream);
            activation.out_type = Type(input);
            activation.width = down.k;
            activation.gate = Gate(std::get<0>(gate));
            activation.alpha = std::get<1>(gate);
            activation.limit = std::get<2>(gate);
            new (self) Mixture(context, router, route, first, down, gated, activation, Type(stream), Type(input));
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 12>(), nb::keep_alive<1, 13>())
      .def(
          "run",
          [](Mixture& m, Address x, Address inner_x, int rows, Address shared, Address gate, Address out) {
            m.run(at(x, int(m.input())), at(inner_x, int(m.input())), rows, at(shared, int(m.stream())), at<const float>(gate),
                  at(out, int(m.stream())));
          },
          no_gil)
      .def_prop_ro("chosen", &Mixture::chosen, "Experts that the last call chose, token by token, best first.");

  nb::class_<LatentLayer>(m, "LatentLayer")
      .def(
          "__init__",
          [](LatentLayer* self, Context& context, std::tuple<int, int, int, int, int, int> sizes, bool interleaved, float scale,
             std::tuple<Address, int, float> q_norm, const Linear* q_b, std::tuple<Address, int, float> kv_norm,
             const Experts& keys, const Experts& values, Address cos, Address sin, int64_t num_positions, int stream, int input) {
            const auto [heads, nope, rope, rank, value, query_width] = sizes;
            new (self) LatentLayer(context, {heads, nope, rope, rank, value, query_width, interleaved, scale}, norm_weight(q_norm),
                                   q_b, norm_weight(kv_norm), keys, values, at<const float>(cos), at<const float>(sin),
                                   num_positions, Type(stream), Type(input));
          },
          nb::arg("context"), nb::arg("sizes"), nb::arg("interleaved"), nb::arg("scale"), nb::arg("q_norm"),
          nb::arg("q_b").none(), nb::arg("kv_norm"), nb::arg("keys"), nb::arg("values"), nb::arg("cos"), nb::arg("sin"),
          nb::arg("num_positions"), nb::arg("stream"), nb::arg("input"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 7>(),
          nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>())
      .def(
          "run",
          [](LatentLayer& l, Address projected, int rows, Address positions, Address slots, Address tables, Address seq_lens,
             int table_stride, Address cache, int block_size, int num_blocks, Address out) {
            l.run({at(projected, int(l.stream())), rows, at<const int64_t>(positions), at<const int64_t>(slots),
                   at<const int32_t>(tables), at<const int32_t>(seq_lens), table_stride, at(cache, int(l.input())), block_size,
                   num_blocks, at(out, int(l.input()))});
          },
          no_gil);

  bind_decoder(m);
}
