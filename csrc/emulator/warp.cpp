#include "emulator/warp.h"

#include <algorithm>
#include <cstring>

#include "emulator/cuda.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {

void with_warp(const char* instruction, uint32_t mask, void* argument, Site site, const WarpWork& work) {
  Warp& warp = *current->warp;
  const int lane = current->lane;
  enter(instruction, site);
  if ((mask >> lane & 1) == 0) fail(site, "%s: lane %d is not in its own mask 0x%08x", instruction, lane, mask);
  if ((mask & ~warp.live) != 0) {
    fail(site, "%s: the mask 0x%08x names lanes that have exited (live: 0x%08x)", instruction, mask, warp.live);
  }
  Rendezvous* r = nullptr;
  for (Rendezvous& other : warp.rendezvous) {
    if ((other.mask & mask) == 0) continue;
    if (other.mask != mask || std::strcmp(other.instruction, instruction) != 0) {
      fail(site, "the warp has diverged: lane %d is at %s (mask 0x%08x), others are at %s (mask 0x%08x) at %s:%d", lane,
           instruction, mask, other.instruction, other.mask, other.site.file, other.site.line);
    }
    if ((other.arrived >> lane & 1) == 0) r = &other;
  }
  if (r == nullptr) {
    warp.rendezvous.push_back({instruction, site, mask, 0, {}, {}});
    r = &warp.rendezvous.back();
  }
  r->arguments[lane] = argument;
  r->threads[lane] = current;
  r->arrived |= 1u << lane;
  if (r->arrived != mask) return suspend();
  const Rendezvous all = *r;
  warp.rendezvous.erase(warp.rendezvous.begin() + (r - warp.rendezvous.data()));
  work(all.arguments);
  for (Thread* t : all.threads) {
    if (t != nullptr && t != current) make_ready(t);
  }
  if (random_schedule()) yield();  // the last to arrive is not always the first to go on
}

void syncwarp(uint32_t mask, Site site) {
  Ignored ignored;
  SyncTag* tag = &current->warp->synchronised;
  release(tag);
  with_warp("__syncwarp", mask, tag, site, [](const LaneArguments&) {});
  acquire(tag);
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Site site) {
  Ignored ignored;
  static const char* const kNames[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync"};
  struct Lane {
    uint64_t in, out;
    int argument;
  } lane{value, 0, argument};
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail(site, "a shuffle of width %d; wanted a power of two up to 32", width);
  with_warp(kNames[static_cast<int>(kind)], mask, &lane, site, [&](const LaneArguments& lanes) {
    for (int i = 0; i < 32; i++) {
      if (lanes[i] == nullptr) continue;
      Lane& to = *static_cast<Lane*>(lanes[i]);
      const int base = i & ~(width - 1), place = i - base;
      int source = place;
      if (kind == Shuffle::index) source = to.argument & (width - 1);
      if (kind == Shuffle::exclusive_or) source = place ^ to.argument;
      if (kind == Shuffle::down) source = place + to.argument;
      if (kind == Shuffle::up) source = place - to.argument;
      if (source < 0 || source >= width) source = place;
      const Lane* from = static_cast<Lane*>(lanes[base + source]);
      to.out = from != nullptr ? from->in : ~uint64_t{0};  // a lane outside the mask: undefined, so poison
    }
  });
  return lane.out;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  Ignored ignored;
  struct Lane {
    bool in;
    uint32_t out;
  } lane{predicate, 0};
  with_warp("a warp vote", mask, &lane, site, [](const LaneArguments& lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; i++) votes |= (lanes[i] != nullptr && static_cast<Lane*>(lanes[i])->in ? 1u : 0u) << i;
    for (void* l : lanes) {
      if (l != nullptr) static_cast<Lane*>(l)->out = votes;
    }
  });
  return lane.out;
}

uint32_t match_any(uint32_t mask, uint64_t value, Site site) {
  Ignored ignored;
  struct Lane {
    uint64_t in;
    uint32_t out;
  } lane{value, 0};
  with_warp("__match_any_sync", mask, &lane, site, [](const LaneArguments& lanes) {
    for (void* a : lanes) {
      for (int i = 0; i < 32 && a != nullptr; i++) {
        if (lanes[i] != nullptr && static_cast<Lane*>(lanes[i])->in == static_cast<Lane*>(a)->in) {
          static_cast<Lane*>(a)->out |= 1u << i;
        }
      }
    }
  });
  return lane.out;
}

uint32_t reduce(Reduction kind, uint32_t mask, uint32_t value, bool is_signed, Site site) {
  Ignored ignored;
  struct Lane {
    uint32_t in, out;
  } lane{value, 0};
  auto combine = [&](uint32_t a, uint32_t b) -> uint32_t {
    const bool less = is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
    switch (kind) {
      case Reduction::add: return a + b;
      case Reduction::min: return less ? a : b;
      case Reduction::max: return less ? b : a;
      case Reduction::bit_and: return a & b;
      case Reduction::bit_or: return a | b;
      default: return a ^ b;
    }
  };
  with_warp("a warp reduction", mask, &lane, site, [&](const LaneArguments& lanes) {
    bool first = true;
    uint32_t sum = 0;
    for (void* l : lanes) {
      if (l == nullptr) continue;
      sum = first ? static_cast<Lane*>(l)->in : combine(sum, static_cast<Lane*>(l)->in);
      first = false;
    }
    for (void* l : lanes) {
      if (l != nullptr) static_cast<Lane*>(l)->out = sum;
    }
  });
  return lane.out;
}

uint32_t active_mask() { return 1u << current->lane; }  // the least that the hardware may answer

bool elect_one(Site site) {
  Ignored ignored;
  const uint32_t live = current->warp->live;
  uint32_t elected = 0;
  with_warp("elect.sync", live, &elected, site, [&](const LaneArguments& lanes) {
    // Which lane is elected is not specified.
    uint32_t lane = static_cast<uint32_t>(__builtin_ctz(live));
    if (random_schedule()) {
      do lane = random_source().below(32);
      while ((live >> lane & 1) == 0);
    }
    for (void* l : lanes) {
      if (l != nullptr) *static_cast<uint32_t*>(l) = lane;
    }
  });
  return elected == static_cast<uint32_t>(current->lane);
}

}  // namespace fastlm::emulator
