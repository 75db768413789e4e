// One text_attention call on raw pointers. Torch-free.
#pragma once
#include <cstdint>

#include "cpu/attention_problem.h"

namespace pyvtk::cpu {

struct TextAttentionProblem {
  AttentionRows q, k, v, out;
  float* lse;  // [batch, q_heads, queries]
  int64_t batch, q_heads, kv_heads, queries, keys, dim;
  const float* k_bias;       // [batch, keys] or nullptr
  const bool* visual;        // [batch, keys] or nullptr: none is
  const bool* k_mask;        // [batch, keys] or nullptr: all exist
  const int32_t* key_slots;  // [batch, 8, slots] of an attention plan, which says both instead, or nullptr
  int64_t slots;
  bool added_keys;           // whether keys without a slot exist, as text
  const bool* visual_heads;  // [q_heads] or nullptr: all are on
  float scale;
  bool keep_mass;

  int64_t group() const { return q_heads / kv_heads; }
};

}  // namespace pyvtk::cpu
