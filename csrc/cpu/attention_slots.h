// What the slots of an attention plan say about their tokens; the order is that of pyvtk/plans.py. Torch-free.
#pragma once
#include <cstdint>

namespace pyvtk::cpu {

enum AttentionSlot : int64_t {
  kSlotRow,
  kSlotImage,
  kSlotT,
  kSlotY,
  kSlotX,
  kSlotPosition,
  kSlotRegion,
  kSlotSample,
  kSlotFields
};

// Among the numbers of images.
inline constexpr int32_t kTextToken = -1, kInvalidToken = -2;

}  // namespace pyvtk::cpu
