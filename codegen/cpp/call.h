// How the host program calls kernels (included by vec.h): one entry for kernels of any signature.
//
// A run of calls is a list of words: for each call the address of its entry, the number of its arguments, and for each argument its
// place in `values`, a table of addresses, sizes and the number of threads. 0 ends it.
#pragma once

namespace tile {

typedef int64_t Entry(const int64_t* values, const int64_t* places);

template <int... I> struct Numbers {};
template <int N, int... I> struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I> struct UpTo<0, I...> { typedef Numbers<I...> type; };

template <class... A, int... I> INLINE int64_t enter(void (*kernel)(A...), const int64_t* values, const int64_t* places, Numbers<I...>) {
  kernel((A)values[places[I]]...);
  return 0;
}
template <class... A, int... I> INLINE int64_t enter(int64_t (*kernel)(A...), const int64_t* values, const int64_t* places, Numbers<I...>) {
  return kernel((A)values[places[I]]...);
}

// Calls the kernel; the fault it met, or 0.
template <class R, class... A> INLINE int64_t enter(R (*kernel)(A...), const int64_t* values, const int64_t* places) {
  return enter(kernel, values, places, typename UpTo<sizeof...(A)>::type{});
}

// Makes the calls up to the first that meets a fault: its number times 2^32 plus the fault, or 0.
INLINE int64_t run(const int64_t* words, const int64_t* values) {
  for (int64_t call = 0; *words; call++, words += 2 + words[1])
    if (int64_t fault = ((Entry*)words[0])(values, words + 2)) return (call << 32) + fault;
  return 0;
}

// A kernel of a GPU, and the functions of the driver's library that it is launched with. `place` is what the library calls the device
// (CUDA: its context, HIP: its number): a thread has one chosen at a time.
struct Launchable {
  int (*launch)(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, void* stream,
                void** parameters, void** extra);
  int (*chosen)(void** place);
  int (*choose)(void* place);
  void* place;
  void* function;
  int64_t threads, shared;
};

const int64_t MOST_PARAMETERS = 512, MOST_PROGRAMS = 2147483647;
const int64_t INVALID_VALUE = 1;  // CUDA_ERROR_INVALID_VALUE, hipErrorInvalidValue

// An entry that launches: its arguments are the parameters of the kernel, the three numbers of programs, the Launchable and the stream.
// Launches are not waited for. Returns what the driver says: 0, or the number of an error.
INLINE int64_t launch(const int64_t* values, const int64_t* places) {
  const int64_t parameters = places[-1] - 5;
  const int64_t *grid = places + parameters, x = values[grid[0]], y = values[grid[1]], z = values[grid[2]];
  const Launchable& it = *(const Launchable*)values[grid[3]];
  if (x <= 0 || y <= 0 || z <= 0) return 0;
  if (x > MOST_PROGRAMS || y > MOST_PROGRAMS || z > MOST_PROGRAMS || parameters > MOST_PARAMETERS) return INVALID_VALUE;
  void* addresses[MOST_PARAMETERS];
  for (int64_t i = 0; i < parameters; i++) addresses[i] = (void*)&values[places[i]];
  void* before = nullptr;
  int error = it.chosen(&before);
  const bool elsewhere = before != it.place;
  if (!error && elsewhere) error = it.choose(it.place);
  if (error) return error;
  error = it.launch(it.function, x, y, z, it.threads, 1, 1, it.shared, (void*)values[grid[4]], addresses, nullptr);
  if (elsewhere) it.choose(before);
  return error;
}

}  // namespace tile
