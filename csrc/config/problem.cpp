// What a problem and a device are: their rules, equality and text.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>

#include "config/cost.h"
#include "config/fields.h"
#include "text.h"

namespace mla_fp8 {
namespace {

// Collects "name must rule, got value"; builds no text while every rule holds.
class Rules {
 public:
  void range(const char* name, int64_t got, int64_t low, int64_t high, int64_t step = 1) {
    if (got >= low && got <= high && got % step == 0) return;
    const std::string multiple = step == 1 ? "" : text("a multiple of ", step, " ");
    add(name, low == high ? text("be ", low) : text("be ", multiple, "in [", low, ", ", high, "]"), got);
  }
  void power_of_2(const char* name, int64_t got) {
    if (got <= 0 || (got & (got - 1)) != 0) add(name, "be a power of 2", got);
  }
  void speed(const char* name, double got) {
    if (!(got > 0) || !std::isfinite(got)) add(name, "be positive and finite", got);
  }
  const std::string& broken() const { return broken_; }

 private:
  template <typename T>
  void add(const char* name, const std::string& rule, T got) {
    broken_ += text(broken_.empty() ? "" : "; ", name, " must ", rule, ", got ", got);
  }
  std::string broken_;
};

void check_problem(Rules& rules, const Problem& p) {
  const bool quantize = p.op == Op::kQuantizeQNope, bmm = p.op == Op::kBmm;
  rules.range("op", static_cast<int64_t>(p.op), 0, static_cast<int64_t>(Op::kVUp));
  rules.range("s", p.s, 0, kMaxRows);
  rules.range("m", p.m, quantize && p.m != 0 ? p.s : 0, quantize ? kMaxPaddedRows : 0);
  const int64_t rows = std::max<int64_t>(rows_covered(p), 1);
  if (!quantize) rules.range("n", p.n, kScaleGroup, kMaxExtent, kScaleGroup);
  // Each column needs a CTA of its own.
  const int64_t columns_a_head = quantize || !rules.broken().empty() ? 1 : p.n / kScaleGroup;
  rules.range("heads", p.heads, 1, std::min(kMaxTokens / rows, kMaxGridX / columns_a_head));
  rules.range("k", p.k, kScaleGroup, kMaxExtent, kScaleGroup);
  rules.range("pe", p.pe, 0, p.op == Op::kAbsorbQ ? kMaxPe : 0, kPeStep);
  rules.range("in_bytes", p.in_bytes, bmm ? 1 : 2, bmm ? 1 : 2);
  rules.range("terms", p.terms, 1, quantize || bmm ? 1 : kMostTerms);
  rules.range("out_bytes", p.out_bytes, bmm ? 2 : 1, quantize ? 1 : 2);
  rules.range("align_bytes", p.align_bytes, bmm ? 1 : 2, kVectorBytes);
  rules.power_of_2("align_bytes", p.align_bytes);
}

void check_device(Rules& rules, const Device& d) {
  // Far above any GPU, and so small that sums and products of limits stay in int64.
  constexpr int64_t kMaxLimit = int64_t{1} << 24;
  rules.range("num_sms", d.num_sms, 1, kMaxLimit);
  rules.range("smem_bytes_per_cta", d.smem_bytes_per_cta, 0, kMaxLimit);
  rules.range("smem_bytes_per_sm", d.smem_bytes_per_sm, 0, kMaxLimit);
  rules.range("smem_bytes_reserved", d.smem_bytes_reserved, 0, kMaxLimit);
  rules.range("threads_per_sm", d.threads_per_sm, 1, kMaxLimit);
  rules.range("registers_per_sm", d.registers_per_sm, 1, kMaxLimit);
  rules.range("ctas_per_sm", d.ctas_per_sm, 1, kMaxLimit);
  rules.speed("dram_gbps", d.dram_gbps);
  rules.speed("l2_gbps", d.l2_gbps);
  rules.speed("l2_bytes", d.l2_bytes);
  rules.speed("mma_tflops", d.mma_tflops);
  rules.speed("launch_us", d.launch_us);
}

}  // namespace

std::string broken_rules(const Problem& problem, const Device& device) {
  Rules rules;
  check_problem(rules, problem);
  check_device(rules, device);
  return rules.broken();
}

const char* op_name(Op op) {
  // In the order of Op.
  constexpr const char* kNames[] = {"quantize_q_nope", "bmm", "absorb_q", "v_up"};
  const auto index = static_cast<size_t>(op);
  return index < std::size(kNames) ? kNames[index] : "unknown op";
}

bool operator==(const Problem& a, const Problem& b) { return fields_of(a) == fields_of(b); }
bool operator==(const Device& a, const Device& b) { return fields_of(a) == fields_of(b); }

std::string describe(const Problem& p) {
  const std::string extents =
      p.op == Op::kQuantizeQNope ? text(", m=", p.m, ", k=", p.k) : text(", n=", p.n, ", k=", p.k, ", pe=", p.pe);
  return text("s=", p.s, ", heads=", p.heads, extents, ", in_bytes=", p.in_bytes, ", terms=", p.terms,
              ", out_bytes=", p.out_bytes, ", align_bytes=", p.align_bytes);
}

std::string describe(const Device& d) {
  return text("a device of ", d.num_sms, " SMs, ", d.smem_bytes_per_cta, " bytes of shared memory a CTA, ",
              d.smem_bytes_per_sm, " an SM, ", d.threads_per_sm, " threads and ", d.registers_per_sm,
              " registers an SM");
}

}  // namespace mla_fp8
