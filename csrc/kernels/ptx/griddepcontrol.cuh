// Programmatic dependent launch: a kernel may start while its predecessor in the stream drains.
#pragma once

#include "types.h"

namespace mla_fp8::ptx {

// Waits until every predecessor has completed and its writes are visible; returns at once where
// none is pending. Every thread of every kernel calls it before it touches memory that another
// kernel writes, and before its own first global write.
MLA_FP8_DEVICE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the successor start once every CTA has called it or has exited. It orders no memory. It is
// called only after the CTA's own wait, so that a grid never overlaps with the successor of its
// successor.
MLA_FP8_DEVICE void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace mla_fp8::ptx
