// packed.h on the CPU. The result is cut into blocks of rows x kPanels panels of columns, which the threads share out.
// For each piece of the depth a thread copies the block of b into panels, which its second-level cache holds, and then
// strips of a go past them, a tile for each strip and panel (tile.h). Nothing is shared between threads: a block of b
// is copied once for each block of rows, which are so many that it does not count.
#include "linear/packed.h"

#include "common/error.h"
#include "common/tasks.h"
#include "linear/tile.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kPanels = 16;     // of a block at the most: 393 KB at a depth of 192, with registers of 256 bits 197
constexpr int64_t kMostRows = 528;  // of a block
constexpr int64_t kCopyRows = 12;   // a block of b is copied in the time in which so many rows are multiplied by it

int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

struct Block {
  int64_t row, rows, col, cols;
};

// What a thread has for a block: lanes (tile.h) and floats.
struct Room {
  static constexpr int64_t kStrips = kGroup * kRoomStride, kSquare = kStrip * kPanel, kBias = kPanels * kPanel;
  float *panels, *strips, *square, *bias, *sums;
  Room(float* buffer, int64_t steps)
      : panels(buffer), strips(panels + kPanels * kPanel * steps), square(strips + kStrips), bias(square + kSquare),
        sums(bias + kBias) {}
  // `rows`: of sums, where they are not kept in `out`
  static int64_t floats(int64_t steps, int64_t rows) {
    return kPanels * kPanel * (steps + rows) + kStrips + kSquare + kBias;
  }
};

// A piece of the depth, in elements, and in steps of the tile.
struct Piece {
  int64_t begin, depth, steps;
};

// Columns col .. col + cols - 1 of b in a piece of the depth, as panels, with zeros past the last column.
template <class N, class T>
void pack(const Operand& b, const Piece& piece, int64_t col, int64_t cols, float* panels) {
  const T* const data = static_cast<const T*>(b.data);
  const auto place = [&](int64_t c) { return panels + c / kPanel * kPanel * piece.steps + c % kPanel; };
  if (b.transposed) {
    for (int64_t c = 0; c < cols; c += kSize) {
      const T* const from = data + (col + c) * b.stride + piece.begin;
      turn_rows<N>(from, b.stride, std::min(kSize, cols - c), piece.depth, place(c), kPanel);
    }
    return;
  }
  for (int64_t i = 0; i < piece.steps; ++i) {  // along the rows of b, whose next ones are fetched meanwhile
    const T* const from = data + (piece.begin + i * N::step) * b.stride + col;
    const T* const second = (i + 1) * N::step <= piece.depth ? from + b.stride : nullptr;
    for (int64_t c = 0; c < cols; c += kSize) {
      for (int64_t k = 0; k < N::step; ++k) prefetch(from + (4 * N::step + k) * b.stride + c);
      store(place(c) + i * kPanel, N::lanes(from + c, second == nullptr ? nullptr : second + c, cols - c));
    }
  }
}

// The rows of a in a piece of the depth, kGroup at a time, as strips.
template <class N, class T>
class Strips {
 public:
  Strips(const Operand& a, const Piece& piece, const Block& block, int64_t panels, float* room)
      : stride_(a.stride), transposed_(a.transposed), data_(static_cast<const T*>(a.data)), piece_(piece),
        end_(block.row + block.rows), panels_(panels), room_(room) {}

  // The strip that begins at `row`. They are asked for in order, from the block's first row on.
  Strip<N> at(int64_t row, int64_t in_group) {
    const int64_t count = std::min<int64_t>(kStrip, end_ - row);
    if (!transposed_) return strip_of_rows<N>(data_ + row * stride_ + piece_.begin, stride_, count, piece_.depth, room_);
    if (in_group == 0) copy_group(row);
    return {reinterpret_cast<const typename N::Element*>(strip(in_group)), N::step, kStrip * N::step};
  }

  // What the tile of this strip and panel fetches of the strips that come after.
  Ahead after(int64_t row, int64_t in_group, int64_t panel) const {
    const int64_t row_bytes = stride_ * static_cast<int64_t>(sizeof(T));
    if (!transposed_) {
      const int64_t lines = parts_of(lines_of<T>(piece_.depth), panels_);
      const char* const next = reinterpret_cast<const char*>(data_ + (row + kStrip) * stride_ + piece_.begin);
      return {next + panel * lines * kLine, std::min<int64_t>(kStrip, end_ - row - kStrip), row_bytes, lines};
    }
    const int64_t each = parts_of(piece_.depth, kGroup / kStrip * panels_);
    const int64_t i = (in_group / kStrip * panels_ + panel) * each, next = row - in_group + kGroup;
    if (next >= end_) return {};
    const T* const first = data_ + (piece_.begin + i) * stride_ + next;
    return {first, std::min(each, piece_.depth - i), row_bytes, lines_of<T>(kGroup) + 1};
  }

 private:
  // A transposed matrix has a strip's numbers of one depth side by side, and so they lie in the copy. Whole vectors are
  // copied (stores of less are slow on some processors): the next step's lanes go over what was too much.
  void copy_group(int64_t row) {
    const int64_t count = std::min(kGroup, end_ - row);
    for (int64_t i = 0; i < piece_.steps; ++i) {
      const T* const from = data_ + (piece_.begin + i * N::step) * stride_ + row;
      const T* const second = (i + 1) * N::step <= piece_.depth ? from + stride_ : nullptr;
      for (int64_t s = 0; s < count; s += kStrip) {
        for (int64_t r = s; r < s + kStrip; r += kSize) {
          const int64_t left = std::max<int64_t>(0, count - r);
          store(strip(s) + i * kStrip + r - s, N::lanes(from + r, second == nullptr ? nullptr : second + r, left));
        }
      }
    }
  }
  float* strip(int64_t in_group) const { return room_ + in_group * kRoomStride; }

  int64_t stride_;
  bool transposed_;
  const T* data_;
  Piece piece_;
  int64_t end_, panels_;
  float* room_;
};

// A tile, of which `rows` x `cols` numbers are wanted.
template <class N>
void tile_at(int64_t steps, Strip<N> strip, const float* lanes, Square<const float> from, Square<float> to, int64_t rows,
             int64_t cols, float* square, Ahead next) {
  const Ahead result{to.data, rows, to.stride * static_cast<int64_t>(sizeof(float)), lines_of<float>(cols)};
  const bool whole = rows == kStrip && (cols == kPanel || cols == kSize);
  Square<const float> begin = from;
  Square<float> end = to;
  if (!whole) {  // by way of a square of the tile's size
    end = {square, kPanel};
    if (from.data != nullptr) {
      begin = {square, kPanel};
      for (int64_t r = 0; r < rows; ++r) std::copy_n(from.data + r * from.stride, cols, square + r * kPanel);
    }
  }
  const auto* const panel = reinterpret_cast<const typename N::Element*>(lanes);
  if (cols > kSize) {
    tile<2, N>(steps, strip, panel, begin, end, next, result);
  } else {
    tile<1, N>(steps, strip, panel, begin, end, next, result);
  }
  if (whole) return;
  for (int64_t r = 0; r < rows; ++r) std::copy_n(square + r * kPanel, cols, to.data + r * to.stride);
}

// Rows of the block's sums, which are still in the cache, into `out`, rounded.
void store_rows(const PackedProduct& p, const Block& block, Square<float> sums, int64_t begin, int64_t rows) {
  with_type(p.out_type, [&](auto type) {
    auto* const out = static_cast<decltype(type)*>(p.out) + block.row * p.out_stride + block.col;
    for (int64_t r = begin; r < begin + rows; ++r) {
      over_row(block.cols, [&](auto at, int64_t c, int) {
        at.store(out + r * p.out_stride + c, at.load(sums.data + r * sums.stride + c));
      });
    }
  });
}

template <class N, class A, class B>
void block_product(const PackedProduct& p, const Block& block, const Room& room) {
  const bool in_place = p.out_type == DType::f32;
  Square<float> sums{room.sums, kPanels * kPanel};
  if (in_place) sums = {static_cast<float*>(p.out) + block.row * p.out_stride + block.col, p.out_stride};
  if (p.bias != nullptr) {
    const B* const bias = static_cast<const B*>(p.bias) + block.col;
    over_row(block.cols, [&](auto at, int64_t c, int) { at.store(room.bias + c, at.load(bias + c)); });
  }
  const int64_t panels = parts_of(block.cols, kPanel);
  const int64_t most = block_depth(parts_of(p.depth, N::step)) * N::step;
  for (int64_t k = 0; k < p.depth; k += most) {
    const int64_t depth = std::min(most, p.depth - k);
    const Piece piece{k, depth, parts_of(depth, N::step)};
    pack<N, B>(p.b, piece, block.col, block.cols, room.panels);
    Strips<N, A> strips(p.a, piece, block, panels, room.strips);
    for (int64_t r = 0; r < block.rows; r += kStrip) {
      const int64_t in_group = r % kGroup, rows = std::min<int64_t>(kStrip, block.rows - r);
      const Strip<N> strip = strips.at(block.row + r, in_group);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t c = panel * kPanel;
        const Square<float> to{sums.data + r * sums.stride + c, sums.stride};
        Square<const float> from{to.data, to.stride};
        if (k == 0 && !p.accumulate) from = {p.bias == nullptr ? nullptr : room.bias + c, 0};
        tile_at(piece.steps, strip, room.panels + c * piece.steps, from, to, rows, std::min(kPanel, block.cols - c),
                room.square, strips.after(block.row + r, in_group, panel));
      }
      if (!in_place && k + depth == p.depth) store_rows(p, block, sums, r, rows);
    }
  }
}

// How the result is cut: blocks of so many rows and panels. With those the threads have done soonest.
struct Cut {
  int64_t rows, panels;
};

Cut cut_for(int64_t rows, int64_t all_panels, int64_t threads) {
  Cut best{};
  int64_t least = 0;
  for (int64_t most = kPanels; most >= 2; most /= 2) {
    const int64_t across = parts_of(all_panels, most), panels = parts_of(all_panels, across);
    for (int64_t size = kMostRows; size >= kGroup; size -= kGroup) {
      const int64_t tasks = parts_of(rows, size) * across;
      // in halves of the time that a panel's row takes: a strip of a that is made ready costs as much as half a panel
      const int64_t task = std::min(size, rows) * (2 * panels + 1) + 2 * kCopyRows * panels;
      const int64_t time = parts_of(tasks, threads) * task;
      if (least == 0 || time < least) best = {size, panels}, least = time;
    }
  }
  return best;
}

template <class N, class A, class B>
void product(const PackedProduct& p) {
  const Cut cut = cut_for(p.rows, parts_of(p.cols, kPanel), max_threads());
  const int64_t columns = cut.panels * kPanel, across = parts_of(p.cols, columns), down = parts_of(p.rows, cut.rows);
  const int64_t steps = block_depth(parts_of(p.depth, N::step));
  const int64_t floats = Room::floats(steps, p.out_type == DType::f32 ? 0 : cut.rows);
  for_each_task(across * down, p.rows * p.cols * p.depth, floats, [&](int64_t i, float* buffer) {
    const int64_t row = i % down * cut.rows, col = i / down * columns;
    const Block block{row, std::min(cut.rows, p.rows - row), col, std::min(columns, p.cols - col)};
    block_product<N, A, B>(p, block, Room(buffer, steps));
  });
}

}  // namespace

void packed_product_cpu(const PackedProduct& p) {
  check(p.rows >= 0 && p.cols >= 0 && p.depth >= 1, "packed_product: wanted rows and cols >= 0 and depth >= 1");
  check(!p.accumulate || (p.out_type == DType::f32 && p.bias == nullptr),
        "packed_product: to add to the result, wanted it in float32 and no bias");
  if (p.rows == 0 || p.cols == 0) return;
#if defined(FASTLM_PAIRS_OF_BF16)
  if (p.a.type == DType::bf16 && p.b.type == DType::bf16) return product<Pairs, bf16, bf16>(p);
#endif
  with_type(p.a.type, [&](auto a) {
    with_type(p.b.type, [&](auto b) { product<Singles, decltype(a), decltype(b)>(p); });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH_BF16(packed_product_cpu, (const PackedProduct& p), (p))
