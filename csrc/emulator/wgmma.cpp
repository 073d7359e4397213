#include "emulator/wgmma.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"
#include "emulator/tensor_map.h"

namespace fastlm::emulator {
namespace {

// The matrix descriptor (PTX ISA, "Matrix descriptor format").
struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t base_offset;
  Swizzle swizzle;
  explicit Descriptor(uint64_t d)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        base_offset(d >> 49 & 7),
        swizzle(d >> 62 == 0 ? Swizzle::none : d >> 62 == 1 ? Swizzle::b128 : d >> 62 == 2 ? Swizzle::b64 : Swizzle::b32) {}
};

constexpr uint32_t kPiece = 16;  // bytes: eight 16-bit elements or four tf32

// Where the 16 bytes lie that hold element (mn, k): mn is a row of a or a column of b. The canonical layouts, in pieces of
// 16 bytes (CUTLASS, cute/arch/mma_sm90_desc.hpp, states the same):
//   K-major:   row mn % 8 of an atom of 8 rows, each as wide as the swizzle; atoms `stride` apart along mn. Without a
//              swizzle a row is one piece and the second piece of k lies `leading` further on.
//   MN-major:  8 values of k, each a row as wide as the swizzle along mn; `leading` apart along mn, `stride` along k
//              (without a swizzle the other way round).
uint32_t piece_address(const Descriptor& d, bool transposed, int mn, int k, int elements) {
  const uint32_t width = d.swizzle == Swizzle::b128 ? 128 : d.swizzle == Swizzle::b64 ? 64 : d.swizzle == Swizzle::b32 ? 32 : 16;
  uint32_t a = d.start;
  const auto m = static_cast<uint32_t>(mn), kk = static_cast<uint32_t>(k);
  if (!transposed) {
    const uint32_t piece = kk / static_cast<uint32_t>(elements);
    a += m % 8 * width + m / 8 * d.stride + piece * (d.swizzle == Swizzle::none ? d.leading : kPiece);
  } else {
    const uint32_t piece = m / 8, pieces = width / kPiece;
    a += kk % 8 * width + piece % pieces * kPiece;
    a += d.swizzle == Swizzle::none ? piece * d.stride + kk / 8 * d.leading : piece / pieces * d.leading + kk / 8 * d.stride;
  }
  return swizzled(a, d.swizzle);
}

struct Reader {
  Block& block;
  const Wgmma::Operation& operation;
  const unsigned char* piece(uint32_t address) const {
    SharedMemory& shared = block.shared;
    if (!shared.inside_allocation(address, kPiece)) {
      fail(operation.site, "wgmma: a descriptor leads to the shared address 0x%x, outside every allocation", address);
    }
    kernel_reads(shared.data + address, kPiece);
    if (std::memcmp(shared.data + address, shared.async_view + address, kPiece) != 0) {
      fail(operation.site, "wgmma read shared memory that ordinary stores have written, with no fence.proxy.async between "
                           "them, or before wgmma.wait_group");
    }
    return shared.async_view + address;
  }
};

float element(MmaType type, const unsigned char* piece, int i) {
  if (type == MmaType::tf32) {
    uint32_t bits;
    std::memcpy(&bits, piece + 4 * i, 4);
    return __builtin_bit_cast(float, bits & 0xffffe000u);
  }
  uint16_t bits;
  std::memcpy(&bits, piece + 2 * i, 2);
  return type == MmaType::bf16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

// Rows (of a) or columns (of b) first to first + count, all k of one operation: put(mn - first, k, value).
template <class Put>
void read_operand(const Reader& reader, uint64_t descriptor, bool transposed, int first, int count, int depth, Put put) {
  const Descriptor d(descriptor);
  const MmaType type = reader.operation.type;
  const int elements = type == MmaType::tf32 ? 4 : 8;
  if (!transposed) {
    for (int i = 0; i < count; i++) {
      for (int k = 0; k < depth; k += elements) {
        const unsigned char* p = reader.piece(piece_address(d, false, first + i, k, elements));
        for (int e = 0; e < elements; e++) put(i, k + e, element(type, p, e));
      }
    }
  } else {
    for (int k = 0; k < depth; k++) {
      for (int i = 0; i < count; i += elements) {
        const unsigned char* p = reader.piece(piece_address(d, true, first + i, k, elements));
        for (int e = 0; e < elements; e++) put(i + e, k, element(type, p, e));
      }
    }
  }
}

void a_from_registers(const Wgmma::Operation& o, float (&a)[16][16]) {
  for (int l = 0; l < 32; l++) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; r++) {
      const int row = g + r % 2 * 8;
      if (o.type == MmaType::tf32) {
        a[row][t + r / 2 * 4] = __builtin_bit_cast(float, o.a[l][r] & 0xffffe000u);
        continue;
      }
      for (int h = 0; h < 2; h++) {
        const auto bits = static_cast<uint16_t>(o.a[l][r] >> 16 * h);
        a[row][2 * t + h + r / 2 * 8] = o.type == MmaType::bf16 ? bfloat16_to_float(bits) : half_to_float(bits);
      }
    }
  }
}

void execute(Warp& warp, const Wgmma::Operation& o) {
  static float a[16][16], b[16][256];  // b[k][column]
  const int depth = o.type == MmaType::tf32 ? 8 : 16;
  const Reader reader{*warp.block, o};
  if (o.a_in_registers) {
    a_from_registers(o, a);
  } else {
    read_operand(reader, o.a_descriptor, o.a_transposed, warp.index % 4 * 16, 16, depth, [](int i, int k, float v) { a[i][k] = v; });
  }
  read_operand(reader, o.b_descriptor, o.b_transposed, 0, o.columns, depth, [](int j, int k, float v) { b[k][j] = v; });
  for (int i = 0; i < 16; i++) {
    float* d = o.d->values[i];
    if (!o.add) std::fill_n(d, o.columns, 0.0f);
    for (int k = 0; k < depth; k++) {
      const float x = a[i][k];
      for (int j = 0; j < o.columns; j++) d[j] += x * b[k][j];
    }
  }
}

// f(lane's register, matrix element) for every element of the warp's 16 rows of d.
template <class F>
void for_each_register(Wgmma::Accumulator& d, F f) {
  for (int l = 0; l < 32; l++) {
    for (int r = 0; r < d.columns / 2; r++) {
      f(d.registers[l][r], d.values[l / 4 + r % 4 / 2 * 8][r / 4 * 8 + l % 4 * 2 + r % 2]);
    }
  }
}

void finish(Wgmma& state, Wgmma::Accumulator* d) {
  if (--d->operations > 0) return;
  for_each_register(*d, [](float& reg, float& value) { reg = value; });
  auto& all = state.accumulators;
  all.erase(std::find_if(all.begin(), all.end(), [&](const auto& x) { return x.get() == d; }));
}

struct Lane {
  float* d;
  const WgmmaOperands* operands;
  bool add;
};

void check_descriptor(uint64_t bits, Site site) {
  const Descriptor d(bits);
  if (d.base_offset != 0) fail(site, "wgmma: a descriptor with a base offset; start tiles at multiples of the swizzle's period");
}

Wgmma::Accumulator* accumulator(Wgmma& state, int columns, const LaneArguments& lanes, Site site) {
  float* first = static_cast<Lane*>(lanes[0])->d;
  for (const auto& d : state.accumulators) {
    if (d->registers[0] != first) continue;
    if (d->columns != columns) fail(site, "wgmma of %d columns on an accumulator of %d under way", columns, d->columns);
    return d.get();
  }
  state.accumulators.push_back(std::make_unique<Wgmma::Accumulator>());
  Wgmma::Accumulator* d = state.accumulators.back().get();
  d->columns = columns;
  d->operations = 0;
  for (int l = 0; l < 32; l++) d->registers[l] = static_cast<Lane*>(lanes[l])->d;
  for_each_register(*d, [](float& reg, float& value) {
    value = reg;
    reg = std::nanf("");
  });
  return d;
}

}  // namespace

void wgmma(MmaType type, int columns, float* d, const WgmmaOperands& operands, bool add, Site site) {
  Ignored ignored;
  Lane lane{d, &operands, add};
  with_warp("wgmma.mma_async", kAllLanes, &lane, site, [&](const LaneArguments& lanes) {
    Wgmma& state = current->warp->wgmma;
    if (current->block->warps.size() % 4 != 0) fail(site, "wgmma in a block that is not made of whole warpgroups of 128 threads");
    if (!state.fenced) fail(site, "wgmma without a wgmma.fence since its registers were last touched");
    if (operands.a == nullptr) check_descriptor(operands.a_descriptor, site);
    check_descriptor(operands.b_descriptor, site);
    Wgmma::Operation o{type, columns, add, operands.a != nullptr, operands.a_transposed, operands.b_transposed,
                       operands.a_descriptor, operands.b_descriptor, {}, nullptr, site};
    for (int l = 0; l < 32; l++) {
      const Lane& x = *static_cast<Lane*>(lanes[l]);
      if (x.operands->a_descriptor != o.a_descriptor || x.operands->b_descriptor != o.b_descriptor || x.add != add) {
        fail(site, "wgmma: the lanes disagree on a descriptor or on scale-d");
      }
      if (o.a_in_registers) std::memcpy(o.a[l], x.operands->a, sizeof o.a[l]);
    }
    o.d = accumulator(state, columns, lanes, site);
    o.d->operations++;
    state.open.push_back(o);
    for (uint64_t v : {static_cast<uint64_t>(columns), o.a_descriptor, o.b_descriptor, static_cast<uint64_t>(add)}) state.note(v);
  });
}

void wgmma_fence(Site site) {
  Ignored ignored;
  with_warp("wgmma.fence", kAllLanes, &site, site, [](const LaneArguments&) { current->warp->wgmma.fenced = true; });
}

void wgmma_commit(Site site) {
  Ignored ignored;
  with_warp("wgmma.commit_group", kAllLanes, &site, site, [](const LaneArguments&) {
    Wgmma& state = current->warp->wgmma;
    state.committed.push_back(std::move(state.open));
    state.open.clear();
  });
}

void wgmma_wait(int groups, Site site) {
  Ignored ignored;
  SyncTag* tag = &current->warp->synchronised;
  with_warp("wgmma.wait_group", kAllLanes, tag, site, [&](const LaneArguments&) {
    Wgmma& state = current->warp->wgmma;
    while (static_cast<int>(state.committed.size()) > groups) {
      for (const Wgmma::Operation& o : state.committed.front()) {
        execute(*current->warp, o);
        finish(state, o.d);
      }
      state.committed.pop_front();
    }
    state.fenced = state.fenced && !state.committed.empty();
    release(tag);
  });
  acquire(tag);
}

void check_no_wgmma_at_exit() {
  const Wgmma& state = current->warp->wgmma;
  if (!state.open.empty()) fail(state.open.front().site, "a warp exits with a wgmma that it never committed");
  for (const auto& group : state.committed) {
    if (!group.empty()) fail(group.front().site, "a warp exits with a wgmma that it did not wait for");
  }
}

const char* diverged_warpgroup(const Block& block) {
  for (size_t w = 0; w + 3 < block.warps.size(); w += 4) {
    for (size_t q = 1; q < 4; q++) {
      if (block.warps[w + q].wgmma.history != block.warps[w].wgmma.history) {
        return "the four warps of a warpgroup executed different wgmma or setmaxnreg instructions";
      }
    }
  }
  return nullptr;
}

}  // namespace fastlm::emulator
