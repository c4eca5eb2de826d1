// What a problem and a device are: their rules, equality and text.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "config/cost.h"
#include "config/fields.h"

namespace mla_fp8 {
namespace {

// Collects "name must rule, got value"; builds no text while every rule holds.
class Rules {
 public:
  void range(const char* name, int64_t got, int64_t low, int64_t high, int64_t step = 1) {
    if (got >= low && got <= high && got % step == 0) return;
    std::ostringstream rule;
    if (low == high) {
      rule << "be " << low;
    } else {
      rule << "be ";
      if (step != 1) rule << "a multiple of " << step << " ";
      rule << "in [" << low << ", " << high << "]";
    }
    add(name, rule.str(), got);
  }
  void power_of_2(const char* name, int64_t got) {
    if (got <= 0 || (got & (got - 1)) != 0) add(name, "be a power of 2", got);
  }
  void speed(const char* name, double got) {
    if (!(got > 0) || !std::isfinite(got)) add(name, "be positive and finite", got);
  }
  bool broken() const { return !text_.empty(); }
  std::string text() const { return text_; }

 private:
  template <typename T>
  void add(const char* name, const std::string& rule, T got) {
    std::ostringstream clause;
    clause << (text_.empty() ? "" : "; ") << name << " must " << rule << ", got " << got;
    text_ += clause.str();
  }
  std::string text_;
};

void check_problem(Rules& rules, const Problem& p) {
  const bool quantize = p.op == Op::kQuantizeQNope, bmm = p.op == Op::kBmm;
  rules.range("op", static_cast<int64_t>(p.op), 0, static_cast<int64_t>(Op::kVUp));
  rules.range("s", p.s, 0, kMaxRows);
  rules.range("m", p.m, quantize && p.m != 0 ? p.s : 0, quantize ? kMaxPaddedRows : 0);
  const int64_t rows = std::max<int64_t>(rows_covered(p), 1);
  if (!quantize) rules.range("n", p.n, kScaleGroup, kMaxExtent, kScaleGroup);
  // Each column needs a CTA of its own.
  const int64_t columns_a_head = quantize || rules.broken() ? 1 : p.n / kScaleGroup;
  rules.range("heads", p.heads, 1, std::min(kMaxTokens / rows, kMaxGridX / columns_a_head));
  rules.range("k", p.k, kScaleGroup, kMaxExtent, kScaleGroup);
  rules.range("pe", p.pe, 0, p.op == Op::kAbsorbQ ? kMaxPe : 0, kPeStep);
  rules.range("in_bytes", p.in_bytes, bmm ? 1 : 2, bmm ? 1 : 2);
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
  return rules.text();
}

const char* op_name(Op op) {
  switch (op) {
    case Op::kQuantizeQNope:
      return "quantize_q_nope";
    case Op::kBmm:
      return "bmm";
    case Op::kAbsorbQ:
      return "absorb_q";
    case Op::kVUp:
      return "v_up";
  }
  return "unknown op";
}

bool operator==(const Problem& a, const Problem& b) { return fields_of(a) == fields_of(b); }
bool operator==(const Device& a, const Device& b) { return fields_of(a) == fields_of(b); }

std::string describe(const Problem& p) {
  std::ostringstream text;
  text << "s=" << p.s << ", heads=" << p.heads;
  if (p.op == Op::kQuantizeQNope) {
    text << ", m=" << p.m << ", k=" << p.k;
  } else {
    text << ", n=" << p.n << ", k=" << p.k << ", pe=" << p.pe;
  }
  text << ", in_bytes=" << p.in_bytes << ", out_bytes=" << p.out_bytes << ", align_bytes=" << p.align_bytes;
  return text.str();
}

std::string describe(const Device& d) {
  std::ostringstream text;
  text << "a device of " << d.num_sms << " SMs, " << d.smem_bytes_per_cta << " bytes of shared memory a CTA, "
       << d.smem_bytes_per_sm << " an SM, " << d.threads_per_sm << " threads and " << d.registers_per_sm
       << " registers an SM";
  return text.str();
}

}  // namespace mla_fp8
