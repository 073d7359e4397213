// wgmma (sm_90a): d (64 x N, float32) = a b (+ d) by a warpgroup of four warps, asynchronously.
//
//   wgmma_fence();  Wgmma<N, Type>::ss(d, a, b, add);  ...;  wgmma_commit();  wgmma_wait<0>();
//
// b comes from shared memory by a descriptor, a by a descriptor (ss) or from registers (rs). Between the fence and the wait
// nothing may touch the registers. Everything must be unrolled and inlined, or ptxas serialises it (C7510 and its like).
#pragma once
#include "common/cuda/ptx_shared.h"
#include "common/cuda/tensor_map.h"
#ifndef __CUDACC__
#include "emulator/wgmma.h"
#endif

namespace fastlm::ptx {

using cuda::Swizzle;

// A matrix in shared memory (PTX ISA, "Matrix descriptor format"), seen as pieces of 16 bytes. Its first byte is 16-byte
// aligned, and its tile starts at a multiple of the swizzle's period (1024, 512 or 256 bytes).
//   K-major (k contiguous): rows as wide as the swizzle, in atoms of 8 rows. stride: from one atom to the next, in bytes.
//     leading: unused with a swizzle; without, from the first 16 bytes of k to the next 16.
//   MN-major (rows of a, columns of b, contiguous): atoms of 8 values of k, each as wide as the swizzle. leading: from one
//     atom to the next along mn, stride: along k; without a swizzle the other way round.
FASTLM_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  const uint64_t layout = swizzle == Swizzle::b128 ? 1 : swizzle == Swizzle::b64 ? 2 : swizzle == Swizzle::b32 ? 3 : 0;
  return uint64_t{address >> 4 & 0x3fff} | uint64_t{leading >> 4 & 0x3fff} << 16 | uint64_t{stride >> 4 & 0x3fff} << 32 |
         layout << 62;
}

FASTLM_DEVICE void wgmma_fence(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence(site);
#endif
}

FASTLM_DEVICE void wgmma_commit(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_commit(site);
#endif
}

// Waits until at most kGroups of the newest groups are under way.
template <int kGroups>
FASTLM_DEVICE void wgmma_wait(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#else
  emulator::wgmma_wait(kGroups, site);
#endif
}

enum class WgmmaType { bf16, f16, tf32 };  // k = 16, 16 and 8
enum class Major { k, mn };                // tf32: k only

// Lane 4 g + t of warp w holds, for each 8 columns: row 16 w + g of columns 2 t and 2 t + 1, then row 16 w + g + 8 of them.
template <int kColumns, WgmmaType kType>
struct Wgmma;

#ifndef __CUDACC__

template <int kColumns, WgmmaType kType>
struct Wgmma {
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256, "8 to 256 columns, a multiple of 8");
  static constexpr emulator::MmaType kElement = kType == WgmmaType::bf16  ? emulator::MmaType::bf16
                                                : kType == WgmmaType::f16 ? emulator::MmaType::f16
                                                                          : emulator::MmaType::tf32;
  template <Major kA = Major::k, Major kB = Major::k>
  static void ss(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add FASTLM_AND_SITE) {
    static_assert(kType != WgmmaType::tf32 || (kA == Major::k && kB == Major::k), "tf32 operands are K-major");
    emulator::wgmma(kElement, kColumns, d, {nullptr, a, b, kA == Major::mn, kB == Major::mn}, add, site);
  }
  template <Major kB = Major::k>
  static void rs(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add FASTLM_AND_SITE) {
    static_assert(kType != WgmmaType::tf32 || kB == Major::k, "tf32 operands are K-major");
    emulator::wgmma(kElement, kColumns, d, {a, 0, b, false, kB == Major::mn}, add, site);
  }
};

#else

// Inline PTX numbers its operands, so every width needs its own text: the registers of d are %0 to %(N/2 - 1), and what
// follows is numbered from there. FASTLM_D_n is the list of the first n registers, FASTLM_O_n the operands.
#define FASTLM_D_4 "%0,%1,%2,%3"
#define FASTLM_O_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FASTLM_D_8 FASTLM_D_4 ",%4,%5,%6,%7"
#define FASTLM_O_8 FASTLM_O_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FASTLM_D_12 FASTLM_D_8 ",%8,%9,%10,%11"
#define FASTLM_O_12 FASTLM_O_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FASTLM_D_16 FASTLM_D_12 ",%12,%13,%14,%15"
#define FASTLM_O_16 FASTLM_O_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTLM_D_20 FASTLM_D_16 ",%16,%17,%18,%19"
#define FASTLM_O_20 FASTLM_O_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FASTLM_D_24 FASTLM_D_20 ",%20,%21,%22,%23"
#define FASTLM_O_24 FASTLM_O_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FASTLM_D_28 FASTLM_D_24 ",%24,%25,%26,%27"
#define FASTLM_O_28 FASTLM_O_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FASTLM_D_32 FASTLM_D_28 ",%28,%29,%30,%31"
#define FASTLM_O_32 FASTLM_O_28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTLM_D_36 FASTLM_D_32 ",%32,%33,%34,%35"
#define FASTLM_O_36 FASTLM_O_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FASTLM_D_40 FASTLM_D_36 ",%36,%37,%38,%39"
#define FASTLM_O_40 FASTLM_O_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FASTLM_D_44 FASTLM_D_40 ",%40,%41,%42,%43"
#define FASTLM_O_44 FASTLM_O_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FASTLM_D_48 FASTLM_D_44 ",%44,%45,%46,%47"
#define FASTLM_O_48 FASTLM_O_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FASTLM_D_52 FASTLM_D_48 ",%48,%49,%50,%51"
#define FASTLM_O_52 FASTLM_O_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FASTLM_D_56 FASTLM_D_52 ",%52,%53,%54,%55"
#define FASTLM_O_56 FASTLM_O_52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FASTLM_D_60 FASTLM_D_56 ",%56,%57,%58,%59"
#define FASTLM_O_60 FASTLM_O_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FASTLM_D_64 FASTLM_D_60 ",%60,%61,%62,%63"
#define FASTLM_O_64 FASTLM_O_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTLM_D_68 FASTLM_D_64 ",%64,%65,%66,%67"
#define FASTLM_O_68 FASTLM_O_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FASTLM_D_72 FASTLM_D_68 ",%68,%69,%70,%71"
#define FASTLM_O_72 FASTLM_O_68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FASTLM_D_76 FASTLM_D_72 ",%72,%73,%74,%75"
#define FASTLM_O_76 FASTLM_O_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FASTLM_D_80 FASTLM_D_76 ",%76,%77,%78,%79"
#define FASTLM_O_80 FASTLM_O_76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FASTLM_D_84 FASTLM_D_80 ",%80,%81,%82,%83"
#define FASTLM_O_84 FASTLM_O_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FASTLM_D_88 FASTLM_D_84 ",%84,%85,%86,%87"
#define FASTLM_O_88 FASTLM_O_84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FASTLM_D_92 FASTLM_D_88 ",%88,%89,%90,%91"
#define FASTLM_O_92 FASTLM_O_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FASTLM_D_96 FASTLM_D_92 ",%92,%93,%94,%95"
#define FASTLM_O_96 FASTLM_O_92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FASTLM_D_100 FASTLM_D_96 ",%96,%97,%98,%99"
#define FASTLM_O_100 FASTLM_O_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FASTLM_D_104 FASTLM_D_100 ",%100,%101,%102,%103"
#define FASTLM_O_104 FASTLM_O_100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FASTLM_D_108 FASTLM_D_104 ",%104,%105,%106,%107"
#define FASTLM_O_108 FASTLM_O_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FASTLM_D_112 FASTLM_D_108 ",%108,%109,%110,%111"
#define FASTLM_O_112 FASTLM_O_108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FASTLM_D_116 FASTLM_D_112 ",%112,%113,%114,%115"
#define FASTLM_O_116 FASTLM_O_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FASTLM_D_120 FASTLM_D_116 ",%116,%117,%118,%119"
#define FASTLM_O_120 FASTLM_O_116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FASTLM_D_124 FASTLM_D_120 ",%120,%121,%122,%123"
#define FASTLM_O_124 FASTLM_O_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FASTLM_D_128 FASTLM_D_124 ",%124,%125,%126,%127"
#define FASTLM_O_128 FASTLM_O_124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// p0 to p5: the numbers of the operands after d. 16-bit types have the two transpositions, tf32 has none.
#define FASTLM_WGMMA_SS_16(N, R, T, p0, p1, p2, p3, p4)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\n"                                             \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." T "." T " {" FASTLM_D_##R "}, %" #p0 ", %" #p1 \
               ", p, 1, 1, %" #p3 ", %" #p4 ";\n}"                                                            \
               : FASTLM_O_##R                                                                                 \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kA)), "n"(static_cast<int>(kB)) \
               : "memory")
#define FASTLM_WGMMA_RS_16(N, R, T, p0, p1, p2, p3, p4, p5, p6)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\n"                                             \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." T "." T " {" FASTLM_D_##R "}, {%" #p0 ",%" #p1 \
               ",%" #p2 ",%" #p3 "}, %" #p4 ", p, 1, 1, %" #p6 ";\n}"                                         \
               : FASTLM_O_##R                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),              \
                 "n"(static_cast<int>(kB))                                                                    \
               : "memory")
#define FASTLM_WGMMA_SS_32(N, R, p0, p1, p2)                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\n"                                             \
               "wgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" FASTLM_D_##R "}, %" #p0 ", %" #p1   \
               ", p, 1, 1;\n}"                                                                                \
               : FASTLM_O_##R : "l"(a), "l"(b), "r"(static_cast<int>(add)) : "memory")
#define FASTLM_WGMMA_RS_32(N, R, p0, p1, p2, p3, p4, p5)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\n"                                             \
               "wgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" FASTLM_D_##R "}, {%" #p0 ",%" #p1   \
               ",%" #p2 ",%" #p3 "}, %" #p4 ", p, 1, 1;\n}"                                                   \
               : FASTLM_O_##R                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add))               \
               : "memory")

#define FASTLM_WGMMA(N, R, p0, p1, p2, p3, p4, p5, p6)                                                         \
  template <WgmmaType kType>                                                                                  \
  struct Wgmma<N, kType> {                                                                                    \
    template <Major kA = Major::k, Major kB = Major::k>                                                       \
    static FASTLM_DEVICE void ss(float (&d)[R], uint64_t a, uint64_t b, bool add) {                           \
      static_assert(kType != WgmmaType::tf32 || (kA == Major::k && kB == Major::k), "tf32 operands are K-major"); \
      if constexpr (kType == WgmmaType::bf16) FASTLM_WGMMA_SS_16(N, R, "bf16", p0, p1, p2, p3, p4);        \
      else if constexpr (kType == WgmmaType::f16) FASTLM_WGMMA_SS_16(N, R, "f16", p0, p1, p2, p3, p4);     \
      else FASTLM_WGMMA_SS_32(N, R, p0, p1, p2);                                                           \
    }                                                                                                         \
    template <Major kB = Major::k>                                                                            \
    static FASTLM_DEVICE void rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool add) {               \
      static_assert(kType != WgmmaType::tf32 || kB == Major::k, "tf32 operands are K-major");                 \
      if constexpr (kType == WgmmaType::bf16) FASTLM_WGMMA_RS_16(N, R, "bf16", p0, p1, p2, p3, p4, p5, p6); \
      else if constexpr (kType == WgmmaType::f16) FASTLM_WGMMA_RS_16(N, R, "f16", p0, p1, p2, p3, p4, p5, p6); \
      else FASTLM_WGMMA_RS_32(N, R, p0, p1, p2, p3, p4, p5);                                               \
    }                                                                                                         \
  };
FASTLM_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
FASTLM_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
FASTLM_WGMMA(24, 12, 12, 13, 14, 15, 16, 17, 18)
FASTLM_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
FASTLM_WGMMA(40, 20, 20, 21, 22, 23, 24, 25, 26)
FASTLM_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
FASTLM_WGMMA(56, 28, 28, 29, 30, 31, 32, 33, 34)
FASTLM_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
FASTLM_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42)
FASTLM_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
FASTLM_WGMMA(88, 44, 44, 45, 46, 47, 48, 49, 50)
FASTLM_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
FASTLM_WGMMA(104, 52, 52, 53, 54, 55, 56, 57, 58)
FASTLM_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
FASTLM_WGMMA(120, 60, 60, 61, 62, 63, 64, 65, 66)
FASTLM_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
FASTLM_WGMMA(136, 68, 68, 69, 70, 71, 72, 73, 74)
FASTLM_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
FASTLM_WGMMA(152, 76, 76, 77, 78, 79, 80, 81, 82)
FASTLM_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
FASTLM_WGMMA(168, 84, 84, 85, 86, 87, 88, 89, 90)
FASTLM_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
FASTLM_WGMMA(184, 92, 92, 93, 94, 95, 96, 97, 98)
FASTLM_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
FASTLM_WGMMA(200, 100, 100, 101, 102, 103, 104, 105, 106)
FASTLM_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
FASTLM_WGMMA(216, 108, 108, 109, 110, 111, 112, 113, 114)
FASTLM_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
FASTLM_WGMMA(232, 116, 116, 117, 118, 119, 120, 121, 122)
FASTLM_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
FASTLM_WGMMA(248, 124, 124, 125, 126, 127, 128, 129, 130)
FASTLM_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#endif

}  // namespace fastlm::ptx
