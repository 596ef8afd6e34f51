// Memory of large results, kept for results to come: what a compiled program allocates by (see ../pool.py).
//
// Fresh memory costs a page fault and the zeroing of a page every 4 KiB, as much time as many kernels take. So a block whose tensor has
// died is kept for the next tensor that fits. A tensor owns its block by DLPack: torch counts the references and calls `give_back` when the
// last of them - tensor, view, storage, array - dies, in whatever thread, whether or not Python still runs.
//
//     take --> capsule --> torch.from_dlpack --> tensor ... its storage dies --> give_back --> idle, or freed
//
// Idle blocks are bounded twice: those in use and idle ones together are never more than those in use once were, and idle ones alone are
// never more than `most_idle`. Nobody waits for the lock: who cannot have it allocates and frees. So a child that was forked while
// another thread held it goes on. No system header: their names would stand beside those of the kernels of the unit.
#pragma once
#include <stdint.h>

namespace output_pool {

// ---- DLPack before 1.0, which every torch takes (https://dmlc.github.io/dlpack)

struct Managed {
  void* data;
  int32_t device_type, device_id, rank, dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
  void* context;
  void (*deleter)(Managed*);
};

// ---- blocks

const int MAX_RANK = 8, MAX_BLOCKS = 256, TRIES = 1000, CPU = 1;
const int64_t ALIGNMENT = 64, SLACK = 8;  // a block may be an eighth larger than what it is taken for

struct Block {
  Managed managed;
  int64_t shape[MAX_RANK], strides[MAX_RANK];
  void* memory;  // as it was allocated
  int64_t size;
};

struct State {
  int64_t used, most_used, idle, most_idle;  // bytes
  int64_t locked;
  int64_t count;
  Block* blocks[MAX_BLOCKS];  // idle; the one that came last at the end
  int64_t sizes[MAX_BLOCKS];
};
static State state;

static int64_t now(int64_t& value) { return __atomic_load_n(&value, __ATOMIC_RELAXED); }
static int64_t add(int64_t& value, int64_t bytes) { return __atomic_add_fetch(&value, bytes, __ATOMIC_RELAXED); }

static bool lock() {
  for (int i = 0; i < TRIES; i++)
    if (!now(state.locked) && !__atomic_exchange_n(&state.locked, 1, __ATOMIC_ACQUIRE)) return true;
  return false;
}
static void unlock() { __atomic_store_n(&state.locked, 0, __ATOMIC_RELEASE); }

// An idle block, no more idle. Under the lock.
static Block* removed(int64_t at) {
  Block* found = state.blocks[at];
  state.count--;
  for (int64_t i = at; i < state.count; i++) state.blocks[i] = state.blocks[i + 1], state.sizes[i] = state.sizes[i + 1];
  add(state.idle, -found->size);
  return found;
}

static Block* allocated(int64_t bytes) {
  Block* block = (Block*)__builtin_malloc(sizeof(Block));
  if (!block) return 0;
  block->size = bytes, block->memory = __builtin_malloc(bytes + ALIGNMENT);
  if (block->memory) return block;
  __builtin_free(block);
  return 0;
}
static void freed(Block* block) {
  __builtin_free(block->memory);
  __builtin_free(block);
}

// Frees idle blocks, the oldest first, until at most so many bytes are left.
static void shrink_to(int64_t bytes) {
  while (now(state.idle) > bytes && lock()) {
    Block* oldest = state.count ? removed(0) : 0;
    unlock();
    if (!oldest) return;
    freed(oldest);
  }
}

// Makes the block an idle one, if there is room.
static bool kept(Block* block) {
  int64_t room = now(state.most_idle) - block->size;
  if (room < 0) return false;
  shrink_to(room);
  if (!lock()) return false;
  bool fits = state.count < MAX_BLOCKS && now(state.idle) <= room;
  if (fits) {
    state.blocks[state.count] = block, state.sizes[state.count] = block->size;
    state.count++;
    add(state.idle, block->size);
  }
  unlock();
  return fits;
}

static void give_back(Managed* managed) {
  Block* block = (Block*)managed;
  add(state.used, -block->size);
  if (!kept(block)) freed(block);
}

// The smallest idle block for so many bytes; of equal ones that used last, which may lie in a cache.
static Block* fitting(int64_t bytes) {
  if (!lock()) return 0;
  int64_t best = -1, limit = bytes + bytes / SLACK;
  for (int64_t i = state.count - 1; i >= 0; i--)
    if (state.sizes[i] >= bytes && state.sizes[i] <= limit && (best < 0 || state.sizes[i] < state.sizes[best])) best = i;
  Block* found = best < 0 ? 0 : removed(best);
  unlock();
  return found;
}

// A block in use: an idle one, or a fresh one, for which idle ones that nothing fits may have to go.
static Block* taken(int64_t bytes) {
  Block* found = fitting(bytes);
  Block* block = found ? found : allocated(bytes);
  if (!block) return 0;
  int64_t used = add(state.used, block->size);
  if (used > now(state.most_used)) __atomic_store_n(&state.most_used, used, __ATOMIC_RELAXED);
  if (!found) shrink_to(now(state.most_used) - used);
  return block;
}

// ---- for Python

typedef void Object;
struct Python {
  Object* (*new_capsule)(void* pointer, const char* name, void (*destructor)(Object*));
  int (*is_valid)(Object* capsule, const char* name);
  void* (*pointer)(Object* capsule, const char* name);
  Object* (*no_memory)();
};
static Python python;
static const char* const NAME = "dltensor";  // torch renames the capsules it takes

static void dropped(Object* capsule) {
  if (python.is_valid(capsule, NAME)) give_back((Managed*)python.pointer(capsule, NAME));
}

// A capsule of row-major memory of that shape: `bytes` in all, the type as DLPack's 4 bytes.
static Object* take(int64_t bytes, int32_t dtype, int32_t rank, const char* shape) {
  Block* block = taken(bytes);
  if (!block) return python.no_memory();
  char* data = (char*)(((int64_t)block->memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  block->managed = Managed{data, CPU, 0, rank, dtype, block->shape, block->strides, 0, 0, give_back};
  __builtin_memcpy(block->shape, shape, rank * sizeof(int64_t));
  for (int64_t i = rank - 1, step = 1; i >= 0; step *= block->shape[i--]) block->strides[i] = step;
  Object* capsule = python.new_capsule(block, NAME, dropped);
  if (!capsule) give_back(&block->managed);
  return capsule;
}

// Before all else. mine: the addresses of `take` and `shrink_to`, and of the state, which begins with its five numbers.
static void start(const int64_t* from_python, int64_t* mine) {
  __builtin_memcpy(&python, from_python, sizeof python);
  mine[0] = (int64_t)take, mine[1] = (int64_t)shrink_to, mine[2] = (int64_t)&state;
}

}  // namespace output_pool
