/* What the modules call of OpenMP's library by name. Found before the compiler's own header, which clang often lacks:
 * neither that nor a runtime to link with is needed, since the modules use torch's (_runtime.py). */
#ifndef QSPARSEPROP_OMP_H
#define QSPARSEPROP_OMP_H

extern int omp_get_max_threads(void);
extern int omp_get_num_threads(void);
extern int omp_get_thread_num(void);

#endif
