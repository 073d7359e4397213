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

constexpr int64_t kPanels = 16;   // a block of them has 393 KB, with registers of 256 bits 197
constexpr int64_t kMostRows = 528;  // of a block
constexpr int64_t kCopyRows = 12;  // a block of b is copied in the time in which so many rows are multiplied by it

int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

struct Block {
  int64_t row, rows, col, cols;
};

// What a thread has for a block.
struct Room {
  static constexpr int64_t kStrips = kGroup * kRoomStride, kSquare = kStrip * kPanel, kBias = kPanels * kPanel;
  float *panels, *strips, *square, *bias, *sums;
  Room(float* buffer, int64_t depth)
      : panels(buffer), strips(panels + kPanels * kPanel * depth), square(strips + kStrips), bias(square + kSquare),
        sums(bias + kBias) {}
  // `rows`: of sums, where they are not kept in `out`
  static int64_t floats(int64_t depth, int64_t rows) {
    return kPanels * kPanel * (depth + rows) + kStrips + kSquare + kBias;
  }
};

// Columns col .. col + cols - 1 of b at depth k .. k + depth - 1, as panels, with zeros past the last column.
template <class T>
void pack(const Operand& b, int64_t k, int64_t depth, int64_t col, int64_t cols, float* panels) {
  const T* const data = static_cast<const T*>(b.data);
  const auto place = [&](int64_t c) { return panels + c / kPanel * kPanel * depth + c % kPanel; };
  if (b.transposed) {
    for (int64_t c = 0; c < cols; c += kSize) {
      turn_rows(data + (col + c) * b.stride + k, b.stride, std::min(kSize, cols - c), depth, place(c), kPanel);
    }
    return;
  }
  for (int64_t i = 0; i < depth; ++i) {  // along the rows of b, whose next ones are fetched meanwhile
    const T* const from = data + (k + i) * b.stride + col;
    for (int64_t c = 0; c < cols; c += kSize) {
      prefetch(from + 4 * b.stride + c);
      store(place(c) + i * kPanel, c + kSize <= cols ? load(from + c) : load_n(from + c, cols - c));
    }
  }
}

// The rows of a at some depth, kGroup at a time, as strips.
template <class T>
class Strips {
 public:
  Strips(const Operand& a, int64_t k, int64_t depth, const Block& block, int64_t panels, float* room)
      : a_(a), data_(static_cast<const T*>(a.data)), k_(k), depth_(depth), end_(block.row + block.rows), panels_(panels),
        room_(room) {}

  // The strip that begins at `row`. They are asked for in order, from the block's first row on.
  Strip at(int64_t row, int64_t in_group) {
    const int64_t count = std::min<int64_t>(kStrip, end_ - row);
    if (!a_.transposed) return strip_of_rows(data_ + row * a_.stride + k_, a_.stride, count, depth_, room_);
    if (in_group == 0) copy_group(row);
    return {strip(in_group), 1, kStrip};
  }

  // What the tile of this strip and panel fetches of the strips that come after.
  Ahead after(int64_t row, int64_t in_group, int64_t panel) const {
    if (!a_.transposed) {
      const int64_t lines = parts_of(lines_of<T>(depth_), panels_);
      const char* const next = reinterpret_cast<const char*>(data_ + (row + kStrip) * a_.stride + k_);
      return {next + panel * lines * kLine, std::min<int64_t>(kStrip, end_ - row - kStrip), bytes(a_.stride), lines};
    }
    const int64_t tiles = kGroup / kStrip * panels_, each = parts_of(depth_, tiles);
    const int64_t i = (in_group / kStrip * panels_ + panel) * each, next = row - in_group + kGroup;
    if (next >= end_) return {};
    return {data_ + (k_ + i) * a_.stride + next, std::min(each, depth_ - i), bytes(a_.stride), lines_of<T>(kGroup) + 1};
  }

 private:
  // A transposed matrix has a strip's numbers of one depth side by side, and so they lie in the copy. Whole vectors are
  // copied (stores of less are slow on some processors): the next depth's numbers go over what was too much.
  void copy_group(int64_t row) {
    const int64_t count = std::min(kGroup, end_ - row);
    for (int64_t i = 0; i < depth_; ++i) {
      const T* const from = data_ + (k_ + i) * a_.stride + row;
      for (int64_t s = 0; s < count; s += kStrip) {
        for (int64_t r = s; r < s + kStrip; r += kSize) {
          const int64_t left = std::max<int64_t>(0, count - r);
          store(strip(s) + i * kStrip + r - s, left >= kSize ? load(from + r) : load_n(from + r, left));
        }
      }
    }
  }
  float* strip(int64_t in_group) const { return room_ + in_group * kRoomStride; }
  static int64_t bytes(int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)); }

  const Operand& a_;
  const T* data_;
  int64_t k_, depth_, end_, panels_;
  float* room_;
};

// A tile, of which `rows` x `cols` numbers are wanted.
void tile_at(int64_t depth, Strip strip, const float* panel, Square<const float> from, Square<float> to, int64_t rows,
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
  if (cols > kSize) {
    tile<2>(depth, strip, panel, begin, end, next, result);
  } else {
    tile<1>(depth, strip, panel, begin, end, next, result);
  }
  if (whole) return;
  for (int64_t r = 0; r < rows; ++r) std::copy_n(square + r * kPanel, cols, to.data + r * to.stride);
}

template <class A, class B>
void block_product(const PackedProduct& p, const Block& block, const Room& room) {
  const bool in_place = p.out_type == DType::f32;
  const Square<float> sums = in_place ? Square<float>{static_cast<float*>(p.out) + block.row * p.out_stride + block.col, p.out_stride}
                                      : Square<float>{room.sums, kPanels * kPanel};
  if (p.bias != nullptr) {
    with_type(p.bias_type, [&](auto type) {
      const auto* const bias = static_cast<const decltype(type)*>(p.bias) + block.col;
      over_row(block.cols, [&](auto at, int64_t c, int) { at.store(room.bias + c, at.load(bias + c)); });
    });
  }
  const int64_t panels = parts_of(block.cols, kPanel);
  const int64_t most = block_depth(p.depth);
  for (int64_t k = 0; k < p.depth; k += most) {
    const int64_t depth = std::min(most, p.depth - k);
    pack<B>(p.b, k, depth, block.col, block.cols, room.panels);
    Strips<A> strips(p.a, k, depth, block, panels, room.strips);
    for (int64_t r = 0; r < block.rows; r += kStrip) {
      const int64_t in_group = r % kGroup, rows = std::min<int64_t>(kStrip, block.rows - r);
      const Strip strip = strips.at(block.row + r, in_group);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t c = panel * kPanel;
        const Square<float> to{sums.data + r * sums.stride + c, sums.stride};
        Square<const float> from{to.data, to.stride};
        if (k == 0 && !p.accumulate) from = p.bias == nullptr ? Square<const float>{} : Square<const float>{room.bias + c, 0};
        tile_at(depth, strip, room.panels + c * depth, from, to, rows, std::min(kPanel, block.cols - c), room.square,
                strips.after(block.row + r, in_group, panel));
      }
    }
  }
  if (in_place) return;
  with_type(p.out_type, [&](auto type) {
    auto* const out = static_cast<decltype(type)*>(p.out) + block.row * p.out_stride + block.col;
    for (int64_t r = 0; r < block.rows; ++r) {
      over_row(block.cols, [&](auto at, int64_t c, int) {
        at.store(out + r * p.out_stride + c, at.load(sums.data + r * sums.stride + c));
      });
    }
  });
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

}  // namespace

void packed_product_cpu(const PackedProduct& p) {
  check(p.rows >= 0 && p.cols >= 0 && p.depth >= 1, "packed_product: wanted rows and cols >= 0 and depth >= 1");
  check(!p.accumulate || (p.out_type == DType::f32 && p.bias == nullptr),
        "packed_product: to add to the result, wanted it in float32 and no bias");
  if (p.rows == 0 || p.cols == 0) return;
  const Cut cut = cut_for(p.rows, parts_of(p.cols, kPanel), max_threads());
  const int64_t columns = cut.panels * kPanel, across = parts_of(p.cols, columns), down = parts_of(p.rows, cut.rows);
  const int64_t depth = block_depth(p.depth);
  const int64_t floats = Room::floats(depth, p.out_type == DType::f32 ? 0 : cut.rows);
  with_type(p.a.type, [&](auto a) {
    with_type(p.b.type, [&](auto b) {
      for_each_task(across * down, p.rows * p.cols * p.depth, floats, [&](int64_t i, float* buffer) {
        const int64_t row = i % down * cut.rows, col = i / down * columns;
        const Block block{row, std::min(cut.rows, p.rows - row), col, std::min(columns, p.cols - col)};
        block_product<decltype(a), decltype(b)>(p, block, Room(buffer, depth));
      });
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(packed_product_cpu, (const PackedProduct& p), (p))
