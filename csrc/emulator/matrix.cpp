#include "emulator/matrix.h"

#include <cuda_fp16.h>

#include <cstring>

#include "emulator/conflicts.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

float low(MmaType type, uint32_t pair) {
  const auto bits = static_cast<uint16_t>(pair);
  return type == MmaType::bf16 ? bfloat16_to_float(bits) : half_to_float(bits);
}
float high(MmaType type, uint32_t pair) { return low(type, pair >> 16); }

// The tensor core ignores the last 13 bits of a tf32 operand.
float tf32(uint32_t bits) { return __builtin_bit_cast(float, bits & 0xffffe000u); }

struct MmaLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
};

// How row, column and register go together: lane = 4 g + t holds rows g and g + 8, and columns 2 t, 2 t + 1 (of C).
template <int K>
void multiply(float (&a)[16][K], float (&b)[K][8], float (&c)[16][8]) {
  for (int i = 0; i < 16; i++) {
    for (int k = 0; k < K; k++) {
      for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    }
  }
}

void mma_16_bit(MmaType type, const LaneArguments& lanes, float (&c)[16][8]) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; l++) {
    const MmaLane& x = *static_cast<MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4 * 2;
    for (int half = 0; half < 2; half++) {  // columns 0 to 7, and 8 to 15
      a[g][t + 8 * half] = low(type, x.a[2 * half]);
      a[g][t + 8 * half + 1] = high(type, x.a[2 * half]);
      a[g + 8][t + 8 * half] = low(type, x.a[2 * half + 1]);
      a[g + 8][t + 8 * half + 1] = high(type, x.a[2 * half + 1]);
      b[t + 8 * half][g] = low(type, x.b[half]);
      b[t + 8 * half + 1][g] = high(type, x.b[half]);
    }
  }
  multiply(a, b, c);
}

void mma_tf32(const LaneArguments& lanes, float (&c)[16][8]) {
  float a[16][8], b[8][8];
  for (int l = 0; l < 32; l++) {
    const MmaLane& x = *static_cast<MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int half = 0; half < 2; half++) {
      a[g][t + 4 * half] = tf32(x.a[2 * half]);
      a[g + 8][t + 4 * half] = tf32(x.a[2 * half + 1]);
      b[t + 4 * half][g] = tf32(x.b[half]);
    }
  }
  multiply(a, b, c);
}

}  // namespace

float half_to_float(uint16_t bits) {
  __half_raw h;
  h.x = bits;
  return __half2float(__half(h));
}

void ldmatrix(uint32_t* r, int count, bool transposed, uint32_t address, Site site) {
  Ignored ignored;
  struct Lane {
    uint16_t row[8];
    uint32_t* r;
    uint32_t address;
  } lane{{}, r, address};
  enter("ldmatrix", site);
  if (current->lane < 8 * count) {  // the other lanes' addresses are not used
    const unsigned char* p = shared_place(address, 16, 16, "ldmatrix", site).data;
    kernel_reads(p, 16);
    std::memcpy(lane.row, p, 16);
  }
  with_warp(transposed ? "ldmatrix.trans" : "ldmatrix", kAllLanes, &lane, site, [&](const LaneArguments& lanes) {
    auto row = [&](int i) { return static_cast<Lane*>(lanes[i])->row; };
    uint32_t addresses[32];
    for (int l = 0; l < 32; l++) addresses[l] = static_cast<Lane*>(lanes[l])->address;
    count_matrices(addresses, count);
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4 * 2;
      for (int m = 0; m < count; m++) {
        const uint16_t first = transposed ? row(8 * m + t)[g] : row(8 * m + g)[t];
        const uint16_t second = transposed ? row(8 * m + t + 1)[g] : row(8 * m + g)[t + 1];
        static_cast<Lane*>(lanes[l])->r[m] = first | static_cast<uint32_t>(second) << 16;
      }
    }
  });
}

void stmatrix(const uint32_t* r, int count, bool transposed, uint32_t address, Site site) {
  Ignored ignored;
  struct Lane {
    const uint32_t* r;
    uint16_t row[8];
    uint32_t address;
  } lane{r, {}, address};
  with_warp(transposed ? "stmatrix.trans" : "stmatrix", kAllLanes, &lane, site, [&](const LaneArguments& lanes) {
    auto row = [&](int i) { return static_cast<Lane*>(lanes[i])->row; };
    uint32_t addresses[32];
    for (int l = 0; l < 32; l++) addresses[l] = static_cast<Lane*>(lanes[l])->address;
    count_matrices(addresses, count);
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4 * 2;
      for (int m = 0; m < count; m++) {
        const uint32_t pair = static_cast<Lane*>(lanes[l])->r[m];
        (transposed ? row(8 * m + t)[g] : row(8 * m + g)[t]) = static_cast<uint16_t>(pair);
        (transposed ? row(8 * m + t + 1)[g] : row(8 * m + g)[t + 1]) = static_cast<uint16_t>(pair >> 16);
      }
    }
  });
  if (current->lane >= 8 * count) return;
  unsigned char* p = shared_place(address, 16, 16, "stmatrix", site).data;
  kernel_writes(p, 16);
  std::memcpy(p, lane.row, 16);
}

void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  Ignored ignored;
  MmaLane lane{d, a, b, c};
  with_warp(type == MmaType::tf32 ? "mma.m16n8k8" : "mma.m16n8k16", kAllLanes, &lane, site, [&](const LaneArguments& lanes) {
    float sum[16][8];
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < 4; i++) sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = static_cast<MmaLane*>(lanes[l])->c[i];
    }
    type == MmaType::tf32 ? mma_tf32(lanes, sum) : mma_16_bit(type, lanes, sum);
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < 4; i++) static_cast<MmaLane*>(lanes[l])->d[i] = sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }
  });
}

}  // namespace fastlm::emulator
